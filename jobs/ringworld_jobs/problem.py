"""What is wrong with a file, said so that the reader can mend it: where, what, limit, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

KeyPath = tuple[str | int, ...]
"""Where a value sits in a file: ("stages", 2, "mesh")."""

NO_VALUE: Any = object()
"""Marks a problem that has no value to show."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in one file.

    Attributes:
        file: path of the file, as the caller gave it.
        line: line of the key or value, from 1; 0 where the whole file is concerned.
        column: column of it, from 1; 0 likewise.
        path: where in the file, ``stages[2].mesh.sequence_parallel``; empty for the whole file.
        value: the offending value as the file would write it; empty where there is none to show.
        message: what is wrong, with the limit and the remedy.
        hint: the valid name or value that was probably meant; empty where nothing is near.
    """

    file: str
    line: int
    column: int
    path: str
    value: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        """One readable line: ``job.yaml:31: stages[2].context_length = '32K': ...``."""
        where = f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        subject = " = ".join(part for part in (self.path, self.value) if part)
        meant = f"; did you mean {self.hint}?" if self.hint else ""
        return where + (f"{subject}: " if subject else "") + self.message + meant


class JobSpecError(ValueError):
    """A job spec or data recipe that cannot be used; holds every problem that was found.

    Attributes:
        problems: in the order of files and lines.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Keep the problems, each once, in reading order."""
        unique = dict.fromkeys(problems)
        files = list(dict.fromkeys(problem.file for problem in unique))
        self.problems = tuple(
            sorted(unique, key=lambda p: (files.index(p.file), p.line, p.column, p.path))
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[JobSpecError], tuple[tuple[Problem, ...]]]:
        """Survive pickling, so that a remote caller sees the problems too."""
        return type(self), (self.problems,)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that looks most like ``name``; empty where none does."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    # A word that was cut short: frames for frames_per_clip, cpus for cpus_per_worker.
    for low, candidate in by_lower.items():
        if len(name) >= 3 and low.startswith(name.lower()):
            return candidate
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else ""


def format_path(path: KeyPath) -> str:
    """Write a path as people read it: ("stages", 2, "mesh") gives stages[2].mesh."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def format_value(value: Any) -> str:
    """Write a value as the file would; only the kind of a mapping or a list, and long text cut."""
    if value is NO_VALUE or isinstance(value, dict | list):
        return ""
    if value is None:
        return "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and len(value) > 60:
        return repr(value[:57] + "...")
    return repr(value)


def kind_of(value: Any) -> str:
    """Say in words what sort of value it is: a mapping, a list, text, nothing."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
