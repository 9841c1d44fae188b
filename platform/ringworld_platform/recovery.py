"""Which failures restart a gang, how often, and how soon. Pure policy: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MAX_DELAY_SECONDS = 30.0

# Exceptions that come back the same however often the gang is built again. By name: the classes
# live in packages that the controller's machine may not have.
USER_ERRORS = frozenset(
    {
        "JobSpecError",
        "ValueError",
        "FileNotFoundError",
        "PermissionError",
        "ImportError",
        "NotImplementedError",
        "CheckpointError",
        "ParityFailed",
    }
)


# torch's, Ray's and Python's own.
MEMORY_ERRORS = frozenset({"OutOfMemoryError", "MemoryError"})
# In a failure's facts: a node, not a device, was short of memory.
NODE_MEMORY = "node_memory"
# How torch words it where the exception has no class of its own.
MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory")


class FailureKind(StrEnum):
    """What went wrong with a gang."""

    WORKER_LOST = "worker lost"
    """A worker's process or node is gone."""
    STALL = "stall"
    """No worker made progress for too long."""
    ERROR = "error"
    """An exception in a worker that may not come back."""
    USER_ERROR = "user error"
    """An exception that comes back: the spec, the data or the code must change."""
    DIVERGED = "diverged"
    """A loss, the gradient or the state is not finite, or jumped."""
    OUT_OF_MEMORY = "out of memory"
    """A device or a node had less memory than the stage wanted."""
    STORE = "store away"
    """The store of the checkpoints did not answer; it may come back."""
    TAKEN_AWAY = "taken away"
    """The gang was warned that it would lose workers, and has: nobody's fault."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a gang ended.

    Attributes:
        kind: decides what follows.
        text: one line for the user: the first cause.
        rank: the rank that failed first, where one did.
        details: a traceback or the ranks' stacks; for the logs.
        facts: what the exception carried, as plain data.
    """

    kind: FailureKind
    text: str
    rank: int | None = None
    details: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from a failure."""

    restart: bool
    delay_seconds: float
    text: str
    free: bool = False
    """Whether the restart counts for nothing."""


def kind_of(
    types: tuple[str, ...], message: str = "", facts: Mapping[str, Any] | None = None
) -> FailureKind:
    """Kind of an exception.

    Args:
        types: names of its class and bases, nearest first.
        message: its text.
        facts: that it carries.
    """
    if "TrainingDiverged" in types:
        return FailureKind.DIVERGED
    if facts and facts.get("store_away"):
        return FailureKind.STORE
    words = message.lower()
    if MEMORY_ERRORS & set(types) or (
        "RuntimeError" in types and any(told in words for told in MEMORY_WORDS)
    ):
        return FailureKind.OUT_OF_MEMORY
    return FailureKind.USER_ERROR if USER_ERRORS & set(types) else FailureKind.ERROR


def decide(failure: Failure, *, restarts: int, max_restarts: int) -> Decision:
    """Restart or give up.

    Args:
        failure: what happened.
        restarts: restarts since the last newly committed checkpoint.
        max_restarts: the budget, ``recovery.max_restarts`` of the spec.

    Returns:
        The decision. The first restart is immediate; each one without progress waits twice as
        long as the one before, so that a broken node does not spin.
    """
    if failure.kind is FailureKind.USER_ERROR:
        return Decision(False, 0.0, failure.text)
    if failure.kind is FailureKind.TAKEN_AWAY:
        return Decision(True, 0.0, f"{failure.text}; goes on elsewhere", free=True)
    if restarts >= max_restarts:
        return Decision(
            False,
            0.0,
            f"{failure.text}; given up after {restarts} restarts without a new checkpoint "
            f"(recovery.max_restarts={max_restarts})",
        )
    delay = delay_after(restarts)
    when = "at once" if delay == 0 else f"in {delay:g} s"
    return Decision(True, delay, f"{failure.text}; restart {restarts + 1} of {max_restarts} {when}")


def delay_after(restarts: int) -> float:
    """Seconds to wait after so many restarts that have brought nothing."""
    return 0.0 if restarts == 0 else min(2.0 ** (restarts - 1), MAX_DELAY_SECONDS)
