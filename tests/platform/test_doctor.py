"""doctor: what is found, what is amiss, and the remedy."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ringworld_platform import cluster, doctor, head
from ringworld_platform.errors import ClusterError

Recording = dict[str, Callable[..., Any]]
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "find_running", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def spec(recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return recording["spec"]()


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is not asked: its answer is given."""

    def probe(questions: Any, accelerator: str) -> tuple[dict[str, Any], str]:
        answers = [["cpu", "the device is a cpu", None] for _ in questions]
        return {"gpus": [], "answers": answers}, ""

    monkeypatch.setattr(doctor, "_probe", probe)


def findings(checkup: doctor.Checkup) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in checkup.findings}


@pytest.mark.timeout(120)
def test_this_machine_as_it_is(spec: Any) -> None:
    found = findings(doctor.examine(spec))
    assert found["torch"].value == metadata.version("torch")
    for stage in ("4k", "8k", "16k"):
        attention = found[f"attention, stage {stage} (fp32)"]
        # A kernel with its reason, or a problem that names the remedy: never nothing.
        assert ":" in attention.value or attention.problem
        assert "one long document: " in attention.value or attention.problem
    assert "triton " in found["optional kernels"].value


def test_a_missing_package_is_a_problem(
    spec: Any, probed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def without_ray(name: str) -> str:
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_ray)
    checkup = doctor.examine(spec)
    assert [finding.subject for finding in checkup.problems] == ["ray"]
    console = Console(record=True, width=80, file=open("/dev/null", "w"))
    console.print(doctor.render(checkup))
    text = console.export_text()
    assert "make setup" in text
    assert "ready" not in text


def test_a_broken_torch_is_a_finding(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args, 1, "", "Traceback\nImportError: libtorch.so\n")

    monkeypatch.setattr(subprocess, "run", crash)
    found = findings(doctor.examine(spec))
    assert "ImportError: libtorch.so" in found["devices"].problem


def test_too_few_cores_and_too_little_disk(
    spec: Any, probed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = spec.resources.workers.model_copy(update={"min": 4096, "max": 4096})
    resources = spec.resources.model_copy(update={"workers": workers})
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = findings(doctor.examine(spec.model_copy(update={"resources": resources})))
    assert "4096 workers x 1 = 4096 cores" in found["cpu"].problem
    assert "checkpoint.keep" in found["store"].problem


def test_gpus_that_are_not_there(spec: Any, probed: None) -> None:
    resources = spec.resources.model_copy(update={"accelerator": "gpu"})
    found = findings(doctor.examine(spec.model_copy(update={"resources": resources})))
    assert "resources.accelerator: cpu" in found["devices"].problem


def test_a_cluster_that_does_not_answer(
    spec: Any, probed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str | None) -> None:
        raise ClusterError(f"no Ray cluster answers at {address}")

    monkeypatch.setattr(cluster, "connect", refuse)
    found = findings(doctor.examine(spec, "10.0.0.9:6379"))
    assert found["cluster"].problem == "no Ray cluster answers at 10.0.0.9:6379"
