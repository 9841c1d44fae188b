"""Tracking of one run, as its runner sees it: begun, ended, and what is wrong with it."""

from __future__ import annotations

from ringworld_platform.live_run import LiveRun
from ringworld_platform.run_state import RunState
from ringworld_platform.tracking_service import TrackedJob, TrackingService

# Shorter than LEASE_SECONDS: nobody takes a run over while its last metrics are sent.
FINISH_SECONDS = 20.0


class RunTracking:
    """Tracks a run while it is in our hands. Nothing here but ``finish`` waits."""

    def __init__(self, live: LiveRun, service: TrackingService) -> None:
        """Track nothing yet."""
        self._live, self._service = live, service
        self._job: TrackedJob | None = None

    def start(self) -> None:
        """Begin, if the job wants it."""
        if self._live.spec.tracking.mlflow != "off":
            live = self._live
            self._job = self._service.track(live.folder.path, live.spec, live.run_id)

    def look(self) -> None:
        """Show in the run's state what is wrong with tracking, if anything is."""
        job, live = self._job, self._live
        if job is not None and job.problem != live.record.tracking_problem:
            live.set_fields(tracking_problem=job.problem)

    def finish(self, state: RunState) -> None:
        """Send the end of the run, and wait for that, but not for ever."""
        job, live = self._job, self._live
        if job is None:
            return
        self._service.end(job, state.value)
        nothing = not live.folder.metrics().items
        if nothing and job.state == "starting":
            # To wait for the server would be to wait for nothing.
            return
        if job.ended.wait(FINISH_SECONDS):
            self.look()
            return
        why = job.problem or f"it took more than {FINISH_SECONDS:g} s"
        live.set_fields(tracking_problem=why)
        command = f"`ringworld track {live.run_id}` sends it"
        live.event("tracking", f"MLflow lacks the end of this run: {why}; {command}")

    def close(self) -> None:
        """Let go: of a run that has ended, what is left is still sent; of any other, nothing."""
        if self._job is not None and self._job.status is None:
            self._service.abandon(self._job)
