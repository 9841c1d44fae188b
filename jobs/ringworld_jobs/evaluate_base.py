"""What the settings of every task of `evaluate:` share: gates, and the checks against a context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from ringworld_jobs.problem import KeyPath
from ringworld_jobs.spec_base import Spec
from ringworld_jobs.units import format_tokens


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit on one figure of a task.

    Attributes:
        field: of the task's settings, such as ``min_accuracy``.
        figure: name of the figure.
        limit: least or greatest value that passes.
        least: whether it is the least.
    """

    field: str
    figure: str
    limit: float
    least: bool

    def missed(self, value: float) -> bool:
        """Whether a value is beyond the limit; what is no number is."""
        return not (value >= self.limit if self.least else value <= self.limit)


class TaskSpec(Spec):
    """Settings that every task has."""

    on_missed: Literal["stop", "warn"] = "stop"
    """What happens when a figure misses its limit. stop: the job fails there, with the figure and
    the limit; warn: an event says so, and the job goes on."""

    def gates(self) -> Iterator[Gate]:
        """The limits that are set."""
        for name in type(self).model_fields:
            kind, _, figure = name.partition("_")
            limit = getattr(self, name)
            if kind in ("min", "max") and isinstance(limit, int | float):
                yield Gate(name, figure, float(limit), kind == "min")

    def problems(self, context_length: int) -> Iterator[tuple[str, str]]:
        """What the settings ask for that this context cannot hold.

        Args:
            context_length: of the stage or model that is evaluated.

        Yields:
            The field, and the message with limit and remedy.
        """
        yield from ()

    def patterns(self) -> Iterator[tuple[KeyPath, str]]:
        """The files that are needed: where in the settings they are named, and the pattern."""
        yield from ()

    def file_problems(self, base: Path) -> Iterator[tuple[str, str]]:
        """What is wrong with files that are read before a model is asked.

        Args:
            base: folder that their paths are relative to.

        Yields:
            The field, and the message.
        """
        yield from ()

    def absolute(self, base: Path) -> Self:
        """The same settings with paths that mean the same wherever they are read.

        Args:
            base: folder that they are relative to: the job file's.
        """
        return self


def too_long(
    field: str, lengths: Iterator[int] | list[int], context_length: int
) -> Iterator[tuple[str, str]]:
    """One problem where a length is beyond the context; see ``TaskSpec.problems``."""
    longest = max(lengths)
    if longest > context_length:
        yield (
            field,
            f"{format_tokens(longest)} tokens are more than the context of "
            f"{format_tokens(context_length)}; take lengths up to {format_tokens(context_length)}",
        )


def absolute_pattern(pattern: str, base: Path) -> str:
    """A path or glob pattern of a job, absolute; one of a package stays as it is."""
    return pattern if pattern.startswith("package:") else str(base.resolve() / pattern)
