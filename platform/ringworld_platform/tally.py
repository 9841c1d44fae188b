"""What a run has come to since somebody asked last: for whoever measures, not for the logs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ringworld_jobs.any_job import Job
from ringworld_platform.run_records import Record


@dataclass(slots=True)
class Counts:
    """What has been added since the last time.

    Attributes:
        steps: that were made.
        tokens: of these.
        recoveries: failures after which a step was made.
        events: by kind.
    """

    steps: int = 0
    tokens: int = 0
    recoveries: int = 0
    events: Counter[str] = field(default_factory=Counter)


class Tally:
    """Counts of a run, and its newest records. It takes microseconds; any thread may call it."""

    def __init__(self, spec: Job, clock: Callable[[], float] = time.monotonic) -> None:
        """Count nothing yet.

        Args:
            spec: of the job.
            clock: monotonic seconds.
        """
        self._tokens = [stage.rows_per_step * stage.context_length for stage in spec.stages]
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = Counts()
        self._failed_at: float | None = None
        self._saved_at: float | None = None
        self.newest: dict[str, Record] = {}
        """The newest record of each kind, of the gang at hand."""
        self.recovery_seconds: float | None = None
        """From the last failure to the next step."""

    @property
    def checkpoint_age_seconds(self) -> float | None:
        """Since the newest checkpoint, or the gang's begin; None before either."""
        return None if self._saved_at is None else self._clock() - self._saved_at

    def hear(self, records: Sequence[Record]) -> None:
        """Count rank 0's records."""
        with self._lock:
            for record in records:
                kind = str(record.get("kind"))
                if kind == "stage_start":
                    self.newest.clear()
                if kind in ("stage_start", "checkpoint"):
                    self._saved_at = self._clock()
                if kind == "step":
                    self._counts.steps += 1
                    self._counts.tokens += self._tokens[int(record.get("stage_index", 0))]
                    self._recovered()
                self.newest[kind] = record

    def event(self, kind: str) -> None:
        """Count an event."""
        with self._lock:
            self._counts.events[kind] += 1
            if kind == "failure":
                self._failed_at = self._clock()

    def take(self) -> Counts:
        """What was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts

    def _recovered(self) -> None:
        if self._failed_at is not None:
            self.recovery_seconds = self._clock() - self._failed_at
            self._failed_at = None
            self._counts.recoveries += 1
