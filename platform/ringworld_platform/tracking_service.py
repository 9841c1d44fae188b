"""The controller's side of tracking: which runs are tracked, by a process of their own.

Nothing here waits for that process, whatever holds it up: what is to be said to it goes through a
queue, and how its runs are is remembered from what it said last.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ringworld_jobs.any_job import Job

log = logging.getLogger(__name__)

_MODULE = "ringworld_platform.tracking_process"
RESTART_SECONDS = 5.0
RUNS_A_PROCESS = 50
"""Runs that end before a process makes way for another: MLflow keeps a store open for each run."""


@dataclass(slots=True)
class TrackedJob:
    """How one run's tracking is, as last heard.

    Attributes:
        folder: of the run.
        start: the message that starts it.
        state: as ``Tracker.state``.
        problem: why the server has not everything, in one line.
        dropped: metrics that were refused.
        status: how the run ended, once it has.
        ended: set once the server has everything.
    """

    folder: Path
    start: dict[str, Any]
    state: str = "starting"
    problem: str | None = None
    dropped: int = 0
    status: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class TrackingService:
    """Tracks runs. Its process lives as long as there are any, and is started again if it dies."""

    def __init__(
        self,
        *,
        restart_seconds: float = RESTART_SECONDS,
        runs_a_process: int = RUNS_A_PROCESS,
    ) -> None:
        """Start nothing yet.

        Args:
            restart_seconds: pause before a process that has died is started again.
            runs_a_process: runs that end before a process makes way for another.
        """
        self._restart_seconds, self._runs_a_process = restart_seconds, runs_a_process
        self._ended = 0
        """Runs that the process has sent to their end."""
        self._lock = threading.Lock()
        self._jobs: dict[str, TrackedJob] = {}
        self.process: subprocess.Popen[str] | None = None
        """The one at work; None while no run is tracked."""
        self._messages: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def track(self, folder: Path, spec: Job, run_id: str) -> TrackedJob:
        """Track a run, anew if it is tracked already.

        Args:
            folder: of the run, with the metric log.
            spec: of the job; ``tracking.mlflow`` is not off.
            run_id: of the run.
        """
        path = str(folder.absolute())
        data = spec.model_dump(mode="json")
        start = {"do": "start", "folder": path, "run_id": run_id, "spec": data}
        job = TrackedJob(folder, start)
        with self._lock:
            self._jobs[path] = job
            if self.process is None:
                self._launch()
            else:
                self._messages.put(start)
        return job

    def end(self, job: TrackedJob, status: str) -> None:
        """Say how a run has ended; what is still to be sent is sent, however long that takes."""
        with self._lock:
            job.status = status
            if self._is_tracked(job):
                self._messages.put(_end(job))

    def abandon(self, job: TrackedJob) -> None:
        """Send nothing more of a run: somebody else does."""
        with self._lock:
            if self._is_tracked(job):
                self._messages.put({"do": "abandon", "folder": job.start["folder"]})
                self._remove(job)

    def close(self) -> None:
        """End the process, whatever it is at."""
        with self._lock:
            self._jobs.clear()
            self._dismiss()

    # --- the process; all with the lock held, but for its reader ---

    def _is_tracked(self, job: TrackedJob) -> bool:
        return self._jobs.get(job.start["folder"]) is job

    def _remove(self, job: TrackedJob) -> None:
        del self._jobs[job.start["folder"]]
        if not self._jobs:
            self._dismiss()

    def _dismiss(self) -> None:
        self.process = None
        # Behind all that is still to be said to it.
        self._messages.put(None)

    def _launch(self) -> None:
        """Start the process and tell it of every run."""
        path = os.pathsep.join(entry for entry in sys.path if entry)
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.process, self._messages, self._ended = process, SimpleQueue(), 0
        for job in self._jobs.values():
            self._messages.put(job.start)
            if job.status is not None:
                self._messages.put(_end(job))
        for target in (self._write, self._read):
            args = (process, self._messages)
            threading.Thread(target=target, args=args, name="tracking", daemon=True).start()

    def _write(
        self, process: subprocess.Popen[str], messages: SimpleQueue[dict[str, Any] | None]
    ) -> None:
        stdin = process.stdin
        try:
            while stdin is not None and (message := messages.get()) is not None:
                stdin.write(json.dumps(message) + "\n")
                stdin.flush()
            if stdin is not None:
                stdin.close()
        except OSError:
            pass  # it has died, as its reader knows

    def _read(
        self, process: subprocess.Popen[str], messages: SimpleQueue[dict[str, Any] | None]
    ) -> None:
        for line in process.stdout or ():
            self._heard(process, json.loads(line))
        messages.put(None)
        code = process.wait()
        with self._lock:
            died = process is self.process
        if not died:
            return
        log.warning("the tracking process has ended with code %d; it is started again", code)
        threading.Event().wait(self._restart_seconds)
        with self._lock:
            if process is self.process:
                self._launch()

    def _heard(self, process: subprocess.Popen[str], said: dict[str, Any]) -> None:
        with self._lock:
            job = self._jobs.get(str(said["folder"])) if process is self.process else None
            if job is None:
                return
            job.state, job.problem, job.dropped = said["state"], said["problem"], said["dropped"]
            if job.state == "ended":
                self._remove(job)
                job.ended.set()
                self._ended += 1
                if self._jobs and self._ended >= self._runs_a_process:
                    self._dismiss()
                    self._launch()


def _end(job: TrackedJob) -> dict[str, Any]:
    return {"do": "end", "folder": job.start["folder"], "status": job.status}
