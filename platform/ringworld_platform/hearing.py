"""What a gang says, into its run's logs and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ringworld_platform.answer_log import BEGIN, AnswerLog
from ringworld_platform.drain import Notice, Warnings
from ringworld_platform.evidence import keep
from ringworld_platform.live_run import LiveRun
from ringworld_platform.rhythm import Rhythm
from ringworld_platform.run_records import Record
from ringworld_platform.slow_rank import STEPS_SEEN, Change, SlowRanks
from ringworld_workers.recorder import Entry, Progress


class Hearing:
    """Hears the gangs of one run: the ``Listener`` of ``gang``."""

    def __init__(
        self,
        live: LiveRun,
        warnings: Warnings,
        *,
        tick: Callable[[], None],
        heed: Callable[[Notice], None],
        rhythm: Callable[[], Rhythm],
    ) -> None:
        """Hear nothing yet.

        Args:
            live: the run.
            warnings: of workers that will soon be gone.
            tick: called several times a second while a gang works.
            heed: a worker was told to end.
            rhythm: how often to ask the ranks.
        """
        self._live, self._warnings = live, warnings
        self._tick, self._heed = tick, heed
        self._rhythm = rhythm
        self._slow = SlowRanks()
        self._answers = AnswerLog(live)

    @property
    def rhythm(self) -> Rhythm:
        """See ``Hearer``."""
        rhythm = self._rhythm()
        return rhythm.watched() if self._live.watched else rhythm

    @property
    def expected_step_seconds(self) -> float | None:
        """See ``Hearer``."""
        predicted = self._live.predicted
        return None if predicted is None else predicted.step_seconds

    def tick(self) -> None:
        """See ``Listener``."""
        self._tick()

    def entries(self, rank: int, entries: Sequence[Entry]) -> None:
        """Log what a rank has said."""
        live = self._live
        live.folder.append_log(rank, [entry.data for entry in entries if entry.kind == "log"])
        for entry in entries:
            if entry.kind == "event":
                data = dict(entry.data)
                text = str(data.pop("text", ""))
                kind = str(data.pop("kind", "worker"))
                data.pop("seq", None)
                if kind == "drain":
                    self._heed(self._warnings.signalled(text))
                if kind == "evidence":
                    name = f"attempt-{live.record.attempt}-{data.pop('name', 'rank')}"
                    data = {"evidence": keep(live.folder.path, name, data.pop("data", {}))}
                if kind == BEGIN:
                    self._answers.begin(data)
                live.event(kind, text, **{"rank": rank, **data})
        self._answers.hear([entry.data for entry in entries if entry.kind == "answer"])
        # The loss and the step are the same on all ranks: one of them writes.
        metrics = [entry.data for entry in entries if entry.kind == "metrics" and rank == 0]
        if metrics:
            for record in metrics:
                self._look_for_slow(record)
            live.metrics(metrics)

    def _look_for_slow(self, record: Record) -> None:
        """Tell of ranks that hold up the others, once an episode."""
        if record.get("kind") == "stage_start":
            self._slow = SlowRanks()
        compute_seconds = record.pop("ring_compute_by_rank", None)
        if compute_seconds is None:
            return
        self._live.computed(compute_seconds)
        working = record["step_seconds"] - record.get("checkpoint_stall_seconds", 0.0)
        changes = self._slow.step(compute_seconds, working, record.get("plan_imbalance", 1.0))
        for change in changes:
            self._live.event("slow", self._told(change), rank=change.rank, ratio=change.ratio)
        if changes or self._slow.ratios:
            self._live.slow_ranks(self._slow.ratios)

    def _told(self, change: Change) -> str:
        workers = self._live.record.workers
        row = workers[change.rank] if change.rank < len(workers) else None
        who = f"rank {change.rank}" + (f" (pid {row.pid} on {row.node})" if row else "")
        if change.ratio is None:
            return f"{who} is no longer slow"
        return (
            f"{who} is slow: its compute takes {change.ratio:.1f} x the others' over the last "
            f"{STEPS_SEEN} steps, and they wait for it"
        )

    def progress(self, rank: int, progress: Progress) -> None:
        """Show a heartbeat."""
        self._live.progress(rank, progress)
        record = self._live.record
        builds = self._live.spec.data.recipe is not None and record.prepared is None
        if builds and not record.workers:
            self._live.set_fields(reason=f"preparing data: {progress.phase}")

    def limit(self, seconds: float) -> None:
        """Show how long the gang may go without progress."""
        if seconds != self._live.record.stall_limit_seconds:
            self._live.show(stall_limit_seconds=seconds)
