"""What each rank shows of itself to whoever scrapes its node: memory, step, time in its phase.

The controller has no part in it: a thousand ranks cost it nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from ringworld_workers.recorder import Recorder

log = logging.getLogger(__name__)

RANK_TAGS = ("run", "stage", "rank")
RANK_SERIES: Mapping[str, str] = MappingProxyType(
    {
        "ringworld_rank_step": "step of the stage that the rank is in, from 1",
        "ringworld_rank_phase_seconds": (
            "since when it is in its phase: one that grows and grows is a stall"
        ),
        "ringworld_rank_memory_host_bytes": "resident memory of its process",
        "ringworld_rank_memory_device_bytes": "most memory of its GPU that was in use at a time",
    }
)
"""Names and what they mean."""


class Gauge(Protocol):
    """Ray's, of ``ray.util.metrics``."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Give a value."""


class RankGauges:
    """Sets a rank's gauges from a thread of its own, as long as its process lives."""

    def __init__(
        self,
        make: Callable[[str, str, tuple[str, ...]], Gauge],
        recorder: Recorder,
        memory: Callable[[], Mapping[str, int]],
        tags: Mapping[str, str],
        pace_seconds: float,
    ) -> None:
        """Set nothing yet; ``start`` begins.

        Args:
            make: makes a gauge of a name, a description and names of tags.
            recorder: has the heartbeat.
            memory: gives ``metrics.memory_bytes``.
            tags: of ``RANK_TAGS``.
            pace_seconds: between two times; Ray forgets a value that it has exported.
        """
        self._gauges = {name: make(name, text, RANK_TAGS) for name, text in RANK_SERIES.items()}
        self._recorder, self._memory = recorder, memory
        self._tags, self._pace = dict(tags), pace_seconds
        self._thread = threading.Thread(target=self._forever, name="gauges", daemon=True)

    def start(self) -> None:
        """Start the thread; it ends with the process."""
        self._thread.start()

    def set(self) -> None:
        """Set them once."""
        progress, memory = self._recorder.progress(), self._memory()
        values = {
            "ringworld_rank_step": float(progress.step),
            "ringworld_rank_phase_seconds": max(0.0, time.time() - progress.since),
            "ringworld_rank_memory_host_bytes": float(memory["memory_host_bytes"]),
        }
        if memory["memory_device_bytes"]:
            values["ringworld_rank_memory_device_bytes"] = float(memory["memory_device_bytes"])
        for name, value in values.items():
            self._gauges[name].set(value, self._tags)

    def _forever(self) -> None:
        never = threading.Event()
        try:
            self.set()
            while not never.wait(self._pace):
                self.set()
        except Exception:
            # Training goes on without them.
            log.exception("this rank's gauges are set no more")
