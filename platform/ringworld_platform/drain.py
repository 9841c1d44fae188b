"""Notices that workers will soon be gone: nodes that Ray drains, and SIGTERM at a worker.

Clouds take machines away after a warning of half a minute or so. Ray marks such a node as draining
(so does ``ray drain-node``, and Ray itself where a node's process gets SIGTERM) and starts nothing
new on it. A gang uses the time for a checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ringworld_platform.recovery import Failure, FailureKind
from ringworld_workers.actor import Identity

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
# Ray ends workers by SIGTERM and, a moment later, SIGKILL; also those that eat up the memory.
# Whoever is lost so soon was not warned but killed.
WARNING_SECONDS = 1.0
# What a gang ends of that loses a worker. Its numbers, rows, store and memory are its own affair.
_OF_LOSS = frozenset({FailureKind.WORKER_LOST, FailureKind.STALL, FailureKind.ERROR})


@dataclass(frozen=True, slots=True)
class Notice:
    """A gang will soon lose workers.

    Attributes:
        text: what is known, for the user.
        heard: when, in monotonic seconds.
        sure: Ray has said so, rather than a signal that may have been meant to kill.
    """

    text: str
    heard: float
    sure: bool

    def explains_loss(self, now: float) -> bool:
        """Whether a failure of the gang at ``now`` (monotonic seconds) is what it warned of."""
        return self.sure or now - self.heard > WARNING_SECONDS


def draining_nodes() -> dict[str, float | None]:
    """Nodes that Ray drains: until when (seconds since the epoch; None: no deadline), by id."""
    # Ray has no public name for it; its own libraries ask here too.
    from ray._private.state import state

    deadlines = state.get_draining_nodes()
    return {node: ms / 1000 if ms else None for node, ms in deadlines.items()}


class DrainWatch:
    """Looks for draining nodes, at most once a second for all runs. Any thread may call it."""

    def __init__(
        self,
        ask: Callable[[], Mapping[str, float | None]] = draining_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the question; nothing is asked yet.

        Args:
            ask: gives the nodes that are drained, and until when.
            clock: monotonic seconds.
        """
        self._ask, self._clock = ask, clock
        self._lock = threading.Lock()
        self._found: Mapping[str, float | None] = {}
        self._asked = -LOOK_SECONDS

    def notice(self, workers: Collection[Identity]) -> Notice | None:
        """What the workers of a gang have to fear."""
        if not workers:
            return None
        now = self._clock()
        with self._lock:
            if now - self._asked >= LOOK_SECONDS:
                self._asked = now
                self._found = self._look()
            found = self._found
        node = next((worker for worker in workers if worker.node in found), None)
        if node is None:
            return None
        deadline = found[node.node]
        left = f", {max(0.0, deadline - time.time()):.0f} s are left" if deadline else ""
        return Notice(f"node {node.ip} is being drained{left}", now, sure=True)

    def _look(self) -> Mapping[str, float | None]:
        try:
            return self._ask()
        except Exception as error:
            # A head that does not answer for a moment fails louder elsewhere.
            log.debug("cannot ask for draining nodes: %s", error)
            return {}


class Warnings:
    """What the gang of one run was warned of."""

    def __init__(self, watch: DrainWatch) -> None:
        """Take the watch; there is no gang yet."""
        self._watch = watch
        self._notice: Notice | None = None

    def forget(self) -> None:
        """Another gang begins."""
        self._notice = None

    def look(self, workers: Collection[Identity]) -> Notice | None:
        """What is new: a node of the gang's that is drained."""
        if self._notice is not None and self._notice.sure:
            return None
        notice = self._watch.notice(workers)
        self._notice = notice or self._notice
        return notice

    def signalled(self, text: str) -> Notice:
        """A worker got SIGTERM."""
        notice = Notice(text, time.monotonic(), sure=False)
        self._notice = self._notice or notice
        return notice

    def explain(self, failure: Failure, when: float) -> Failure:
        """A loss that was announced, as what it is; any other failure as it is.

        Args:
            failure: of the gang.
            when: it was noticed, in monotonic seconds.
        """
        notice = self._notice
        if notice is None or failure.kind not in _OF_LOSS:
            return failure
        if not notice.explains_loss(when):
            return failure
        text = f"{notice.text}; {failure.text}"
        return replace(failure, kind=FailureKind.TAKEN_AWAY, text=text)

    def ended(self, result: Mapping[str, Any], told: str) -> Failure | None:
        """Why a gang has stopped though nobody asked; None if it was not warned.

        Args:
            result: of the gang.
            told: what there is to say of it besides its step.
        """
        if self._notice is None:
            return None
        saved = told or f"saved step {result.get('step')}"
        return Failure(FailureKind.TAKEN_AWAY, f"{self._notice.text}; {saved}")
