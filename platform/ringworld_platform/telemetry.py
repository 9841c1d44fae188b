"""The controller's metrics for Prometheus, by way of Ray: see ``telemetry_table`` for their names.

They are set twice as often as Ray exports them, whatever the runs do meanwhile: a step costs
nothing more. Ray forgets a gauge that is not set again, so that what is shown of a run ends with
it, and of a stage with the stage.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import psutil

from ringworld_platform import telemetry_table as table
from ringworld_platform.job_queue import JobQueue
from ringworld_platform.live_run import LiveRun
from ringworld_platform.run_state import RunState
from ringworld_platform.tally import Counts
from ringworld_platform.telemetry_table import Series

log = logging.getLogger(__name__)


class Runner(Protocol):
    """A run in the controller's hands: ``JobRunner``."""

    @property
    def live(self) -> LiveRun:
        """The run."""

    @property
    def active(self) -> bool:
        """Whether it is at work here."""


class Meters(Protocol):
    """Where values go."""

    def set(self, series: Series, value: float, tags: dict[str, str]) -> None:
        """Give a gauge's value."""

    def add(self, series: Series, value: float, tags: dict[str, str]) -> None:
        """Add to a counter."""


class RayMeters:
    """Ray's metrics, exported by the node that this process is on."""

    def __init__(self) -> None:
        """Make those of the controller."""
        from ray.util.metrics import Counter, Gauge

        own = {series.name for series in table.RANK_TABLE}
        made = [series for series in table.all_series() if series.name not in own]
        self._made: dict[str, Any] = {
            series.name: (Counter if series.counter else Gauge)(
                series.name, series.meaning, series.tags
            )
            for series in made
        }

    def set(self, series: Series, value: float, tags: dict[str, str]) -> None:
        """See ``Meters``."""
        self._made[series.name].set(value, tags)

    def add(self, series: Series, value: float, tags: dict[str, str]) -> None:
        """See ``Meters``."""
        if value > 0:
            self._made[series.name].inc(value, tags)


class Telemetry:
    """Sets the controller's metrics, from a thread of its own."""

    def __init__(
        self,
        runners: Callable[[], Collection[Runner]],
        line: JobQueue,
        meters: Callable[[], Meters] = RayMeters,
    ) -> None:
        """Set nothing yet.

        Args:
            runners: of all runs that the controller has, or has had.
            line: has the gangs that hold workers.
            meters: makes where values go; called in the thread.
        """
        self._runners, self._line, self._make = runners, line, meters
        self._closing = threading.Event()
        self._cpu_seconds = 0.0
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._forever, name="telemetry", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Set them no more."""
        self._closing.set()

    def _forever(self) -> None:
        from ringworld_workers.actor import export_seconds

        try:
            meters, pace = self._make(), export_seconds() / 2
        except Exception:
            log.exception("no metrics for Prometheus")
            return
        told = ""
        while not self._closing.wait(pace):
            try:
                self.measure(meters)
            except Exception as error:
                # The runs go on; said once, not every five seconds.
                if str(error) != told:
                    log.exception("metrics were not set")
                told = str(error)

    def measure(self, meters: Meters) -> None:
        """Set every metric as of now."""
        runners = list(self._runners())
        states: Counter[str] = Counter({state.value: 0 for state in RunState})
        counts = Counts()
        active: list[LiveRun] = []
        for runner in runners:
            live = runner.live
            record = live.record
            if runner.active:
                active.append(live)
            if runner.active or record.terminal:
                states[record.state.value] += 1
            taken = live.tally.take()
            counts.steps += taken.steps
            counts.tokens += taken.tokens
            counts.recoveries += taken.recoveries
            counts.events += taken.events
        for live in active:
            _measure_run(meters, live)
        for state, number in states.items():
            meters.set(table.JOBS, number, {"state": state})
        holdings, _ = self._line.standing()
        workers = sum(sum(holding.places.values()) for holding in holdings.values())
        meters.set(table.WORKERS, workers, {})
        meters.set(table.LINE, sum(live.record.place is not None for live in active), {})
        now = time.time()
        beats = [live.record.owner.beat for live in active if live.record.owner is not None]
        meters.set(table.LEASE, max((now - beat for beat in beats), default=0.0), {})
        meters.set(table.MEMORY, self._process.memory_info().rss, {})
        self._count(meters, counts)

    def _count(self, meters: Meters, counts: Counts) -> None:
        cpu = time.process_time()
        meters.add(table.CPU, cpu - self._cpu_seconds, {})
        self._cpu_seconds = cpu
        meters.add(table.STEPS, counts.steps, {})
        meters.add(table.TOKENS, counts.tokens, {})
        meters.add(table.RECOVERIES, counts.recoveries, {})
        for kind, number in counts.events.items():
            meters.add(table.EVENTS, number, {"kind": kind})


def _measure_run(meters: Meters, live: LiveRun) -> None:
    record, tally = live.record, live.tally
    tags = {"run": live.run_id, "stage": record.stage or "data"}
    state = {series.source: getattr(record, series.source) for series in table.RUN_SERIES}
    _set_all(meters, table.RUN_SERIES, state, tags)
    if tally.recovery_seconds is not None:
        meters.set(table.RECOVERY, tally.recovery_seconds, tags)
    if not record.workers:
        return  # what the last gang has said stands for nothing now
    _set_all(meters, table.STEP_SERIES, tally.newest.get("step", {}), tags)
    _set_all(meters, table.CHECKPOINT_SERIES, tally.newest.get("checkpoint", {}), tags)
    if (age := tally.checkpoint_age_seconds) is not None:
        meters.set(table.CHECKPOINT_AGE, age, tags)


def _set_all(
    meters: Meters, section: Sequence[Series], found: Mapping[str, Any], tags: dict[str, str]
) -> None:
    for series in section:
        value = found.get(series.source)
        if isinstance(value, int | float):
            meters.set(series, value, tags)
