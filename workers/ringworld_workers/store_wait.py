"""Waiting for a store that is away, by all ranks alike, with their state in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from ringworld_workers.checkpoint.exchange import all_gather_json
from ringworld_workers.mesh import Mesh

MOST_PAUSE_SECONDS = 30.0
_BEAT_SECONDS = 1.0


class StoreWait:
    """Pauses between tries, each twice as long as the one before, until time is up.

    Time counts from the first pause on, tries included.
    """

    def __init__(
        self,
        limit_seconds: float,
        mesh: Mesh,
        *,
        should_stop: Callable[[], bool],
        beat: Callable[[], None],
    ) -> None:
        """Wait for nothing yet.

        Args:
            limit_seconds: after which waiting is given up.
            mesh: whose ranks wait together.
            should_stop: whether somebody asked this rank to stop: nobody waits then.
            beat: called about every second.
        """
        self._limit, self._mesh = limit_seconds, mesh
        self._should_stop, self._beat = should_stop, beat
        self._began: float | None = None
        self._pause = 0.5

    def wait(self) -> Literal["again", "late", "stop"]:
        """Pause before the next try, unless time is up or a rank is asked to stop. A collective."""
        if self._began is None:
            self._began = time.monotonic()
        self._pause = min(2 * self._pause, MOST_PAUSE_SECONDS)
        until = time.monotonic() + self._pause
        while True:
            left = until - time.monotonic()
            late = self._mesh.rank == 0 and time.monotonic() - self._began > self._limit
            # In short collectives: a pause may outlast a timeout.
            told = all_gather_json([self._should_stop(), late, left > 0], self._mesh)
            stop, over, more = (any(each) for each in zip(*told, strict=True))
            if stop or over:
                return "stop" if stop else "late"
            if not more:
                return "again"
            self._beat()
            time.sleep(max(0.0, min(left, _BEAT_SECONDS)))
