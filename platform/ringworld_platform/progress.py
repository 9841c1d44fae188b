"""What a display knows of a run while it goes: its status, recent metrics and last events."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ringworld_platform.run_records import Record
from ringworld_platform.run_view import RunView

KEPT_STEPS = 4000
NEW_STEPS = 1000
"""Of these, the newest, none is left out."""
KEPT_EVENTS = 200


@dataclass(slots=True)
class RunProgress:
    """A run as seen so far; ``poll`` brings it up to date.

    Attributes:
        view: where to ask.
        name: run id.
        status: the last status.
        spec: the resolved spec, empty where it cannot be had.
        steps: step records of the whole run, thinned out towards its begin.
        stages: the last stage_start, step, validation and parity record, by stage index; and the
            first stage_start as ``begin``.
        checkpoint: the record of the newest checkpoint.
        events: recent events.
        new_events: those that the last poll brought.
        new_records: metric records that the last poll brought.
    """

    view: RunView
    name: str
    status: Record = field(default_factory=dict)
    spec: Record = field(default_factory=dict)
    steps: list[Record] = field(default_factory=list)
    stages: dict[int, dict[str, Record]] = field(default_factory=dict)
    checkpoint: Record = field(default_factory=dict)
    events: deque[Record] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    new_events: list[Record] = field(default_factory=list)
    new_records: list[Record] = field(default_factory=list)
    _next_metric: int = 0
    _last_event: int = 0

    def poll(self) -> None:
        """Ask for the status, and for what is new in the logs."""
        self.status = self.view.status(self.name)
        if not self.spec:
            self.spec = self.view.spec(self.name)
        self.new_events = self.view.events(self.name, after=self._last_event)
        if self.new_events:
            self._last_event = max(int(event.get("seq", 0)) for event in self.new_events)
            self.events.extend(self.new_events)
        self.new_records = []
        while True:
            page = self.view.metrics(self.name, after=self._next_metric)
            if page.next == self._next_metric:
                break
            self._next_metric = page.next
            self.new_records += page.items
        self._take(self.new_records)

    @property
    def ended(self) -> bool:
        """Whether the run is in a terminal state."""
        return self.status.get("state") in ("SUCCEEDED", "FAILED", "STOPPED")

    def series(self, name: str) -> list[float]:
        """The values of ``points``."""
        return [value for _, value in self.points(name)]

    def points(self, name: str) -> list[tuple[int, float]]:
        """One metric over the steps of the job; a redone step counts once, NaN not at all."""
        newest = {
            int(step.get("global_step", 0)): float(step[name])
            for step in self.steps
            if isinstance(step.get(name), int | float) and math.isfinite(step[name])
        }
        return sorted(newest.items())

    def recent(self, name: str, count: int = 20) -> list[float]:
        """The last values of one metric, of the stage at hand."""
        index = self.status.get("stage_index")
        last = [step for step in self.steps[-count:] if step.get("stage_index") == index]
        return [float(step[name]) for step in last if step.get(name) is not None]

    def last(self, name: str) -> float | None:
        """The newest value of one metric; NaN where it was no finite number."""
        for step in reversed(self.steps):
            if name in step:
                return math.nan if step[name] is None else float(step[name])
        return None

    def _take(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            kind = record.get("kind")
            if kind == "step":
                self.steps.append(record)
            elif kind == "checkpoint":
                self.checkpoint = record
            elif kind == "stage_start":
                self.stages.setdefault(int(record.get("stage_index", 0)), {}).setdefault(
                    "begin", record
                )
            if kind in ("step", "validation", "stage_start", "stage_end", "parity"):
                known = self.stages.setdefault(int(record.get("stage_index", 0)), {})
                # A step without any token of a modality leaves its last loss standing.
                before = known.get("step", {}) if kind == "step" else {}
                known[str(kind)] = {**before, **record}
        if len(self.steps) > KEPT_STEPS:
            old, new = self.steps[:-NEW_STEPS], self.steps[-NEW_STEPS:]
            self.steps = old[:: -(-len(old) // (KEPT_STEPS // 2))] + new
