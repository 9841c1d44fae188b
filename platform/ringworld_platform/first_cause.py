"""Which of several failed ranks failed first, and what to call it.

When one rank dies or raises, its peers raise too, milliseconds later, about a closed connection.
The line that a user needs is the first one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ringworld_platform.recovery import NODE_MEMORY, Failure, FailureKind, kind_of
from ringworld_workers.actor import WorkerFailure

# How a collective words the loss of a peer.
_ECHOES = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "gloo",
    "nccl",
    "socket timeout",
    "timed out",
)
# How Ray words an end that no signal from elsewhere made.
_ENDED_BY_RAY = ("ray.kill", "exit code", "INTENDED_")
# How Ray words what its memory monitor saw.
_NODE_MEMORY = re.compile(r"was ([\d.]+)GB used / ([\d.]+)GB limit")


@dataclass(frozen=True, slots=True)
class Suspect:
    """One rank's failure."""

    rank: int
    failure: Failure
    lost: bool
    echo: bool
    time: float
    unexplained: bool = False
    """Its process has ended, and neither it nor Ray says why."""

    def order(self) -> tuple[int, float]:
        """Sorts the likelier first cause first: own errors, lost workers, echoes; then by time."""
        if self.echo:
            return 2, self.time
        return (1 if self.lost else 0), self.time


def lost_worker(rank: int, where: str, error: Exception) -> Suspect:
    """A worker whose process is gone."""
    text, kind, unexplained = str(error), FailureKind.WORKER_LOST, False
    if "running low on memory" in text:
        kind = FailureKind.OUT_OF_MEMORY
        used = _NODE_MEMORY.search(text)
        how_much = f" ({used[1]} of {used[2]} GB were in use)" if used else ""
        why = f"Ray killed it because its node ran out of memory{how_much}"
    elif "node has died" in text or "node was terminated" in text:
        why = "its node is gone"
    elif "creation task" in text or "__init__" in text or "No module named" in text:
        why = "it could not start: " + _last_line(text)
    else:
        # Ray lists the same guesses whatever happened: none says more than this.
        why = "its process ended without a Python error (killed, out of memory, or crashed)"
        unexplained = not any(told in text for told in _ENDED_BY_RAY)
    facts = {NODE_MEMORY: True} if kind is FailureKind.OUT_OF_MEMORY else {}
    failure = Failure(kind, f"rank {rank} ({where}) was lost: {why}", rank, text, facts)
    return Suspect(rank, failure, lost=True, echo=False, time=0.0, unexplained=unexplained)


def raised(rank: int, error: WorkerFailure) -> Suspect:
    """A worker whose code raised."""
    kind = kind_of(error.types, error.message, error.facts)
    text = f"rank {rank}: {error.types[0]}: {_one_line(error.message)}"
    message = error.message.lower()
    echo = kind is FailureKind.ERROR and any(word in message for word in _ECHOES)
    failure = Failure(kind, text, rank, error.traceback, error.facts)
    return Suspect(rank, failure, lost=False, echo=echo, time=error.time)


def first_cause(suspects: Sequence[Suspect]) -> Suspect:
    """The one whose failure is shown and judged."""
    return min(suspects, key=Suspect.order)


def _one_line(text: str) -> str:
    # A file's name may be no UTF-8, and then no state could hold it.
    plain = text.encode("utf-8", "replace").decode()
    return " ".join(plain.split())[:1000]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else text
