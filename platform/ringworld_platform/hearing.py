"""What a gang says, into its run's logs and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ringworld_platform.drain import Notice, Warnings
from ringworld_platform.live_run import LiveRun
from ringworld_platform.rhythm import Rhythm
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
        logged: Callable[[], None],
        rhythm: Callable[[], Rhythm],
    ) -> None:
        """Hear nothing yet.

        Args:
            live: the run.
            warnings: of workers that will soon be gone.
            tick: called several times a second while a gang works.
            heed: a worker was told to end.
            logged: the metric log has new lines.
            rhythm: how often to ask the ranks.
        """
        self._live, self._warnings = live, warnings
        self._tick, self._heed, self._logged = tick, heed, logged
        self._rhythm = rhythm

    @property
    def rhythm(self) -> Rhythm:
        """See ``Hearer``."""
        return self._rhythm()

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
                live.event(kind, text, **{"rank": rank, **data})
        # The loss and the step are the same on all ranks: one of them writes.
        metrics = [entry.data for entry in entries if entry.kind == "metrics" and rank == 0]
        if metrics:
            live.metrics(metrics)
            self._logged()

    def progress(self, rank: int, progress: Progress) -> None:
        """Show a heartbeat."""
        self._live.progress(rank, progress)
        if not self._live.record.workers and self._live.record.prepared is None:
            self._live.set_fields(reason=f"preparing data: {progress.phase}")

    def limit(self, seconds: float) -> None:
        """Show how long the gang may go without progress."""
        if seconds != self._live.record.stall_limit_seconds:
            self._live.show(stall_limit_seconds=seconds)
