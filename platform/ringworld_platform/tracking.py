"""MLflow tracking: replays the metric log to a server, and never stands in training's way.

``metrics.jsonl`` is the truth and is written first, by others. A thread here reads it from the
last acknowledged byte, sends what it finds in batches and saves the new position, so that a
server's outage is a gap that is filled later and a restart neither loses nor repeats a point.
One parent run a job and one child run a stage, on one axis of the job's steps, the same ones over
restarts and resumes. The thread belongs to a process of its own (``tracking_process``): what it
imports and draws would hold up all other threads of the controller's.
"""

from __future__ import annotations

import fcntl
import logging
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from ringworld_jobs.any_job import Job
from ringworld_platform.mlflow_errors import Gone, ServerAway, one_line
from ringworld_platform.run_records import METRICS_FILE
from ringworld_platform.tracked_run import TrackedRun
from ringworld_platform.tracked_sending import Sending

logger = logging.getLogger(__name__)

RETRY_MOST_SECONDS = 60.0
LOCK_FILE = "mlflow.lock"
SENT_BY_ANOTHER = "another process sends this run at the moment"

State = Literal["off", "starting", "sending", "up to date", "unreachable", "ended"]


def tracking_uri(spec: Job, run_folder: Path) -> str:
    """MLflow's URI of where a run is tracked; empty where it is not."""
    uri = spec.tracking.mlflow
    if uri == "auto":
        return f"sqlite:///{run_folder.absolute() / 'mlflow.db'}"
    return "" if uri == "off" else uri


class Tracker:
    """Sends one run's metric log to MLflow from a thread of its own.

    No method raises for a server's trouble, and none but ``finish`` waits.
    """

    def __init__(
        self,
        run_folder: Path,
        spec: Job,
        run_id: str,
        *,
        uri: str | None = None,
        anew: bool = False,
        pace_seconds: float = 2.0,
    ) -> None:
        """Prepare; nothing is read, imported or sent yet.

        Args:
            run_folder: holds metrics.jsonl; mlflow.json is kept there.
            spec: the resolved job spec; ``tracking`` says where to send, and as what.
            run_id: name of the parent run.
            uri: send here instead.
            anew: send all of the log again, whatever was sent; points that are there stay once.
            pace_seconds: how often to look for new lines, and the pause after a first failure,
                which doubles up to a minute.
        """
        self._folder = run_folder.absolute()
        self._spec = spec
        self._run_id = run_id
        self._uri = tracking_uri(spec, run_folder) if uri is None else uri
        self._anew = anew
        self._pace_seconds = pace_seconds
        self._finishing = threading.Event()
        self._abandoned = threading.Event()
        self._final_status: str | None = None
        self._thread: threading.Thread | None = None
        self._saved = TrackedRun()
        self._sending: Sending | None = None
        self.state: State = "starting" if self._uri else "off"
        self.problem: str | None = None
        """Why the server has not everything, in one line."""
        self.dropped = 0
        """Metrics that the server refused, and lines of the log that cannot be read."""

    def start(self) -> None:
        """Start the thread. Does nothing when tracking is off or it runs already."""
        if self.state == "off" or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._main, name="ringworld-tracking", daemon=True)
        self._thread.start()

    def end(self, status: str) -> None:
        """Once the log is sent, send the plots and the report too, and end the MLflow runs.

        Args:
            status: SUCCEEDED, FAILED or STOPPED.
        """
        self._final_status = status
        self._finishing.set()

    def finish(self, status: str, timeout_seconds: float = 30.0) -> bool:
        """``end``, and wait for it.

        Args:
            status: SUCCEEDED, FAILED or STOPPED.
            timeout_seconds: longest wait; what is not sent by then is still tried, until
                ``abandon``.

        Returns:
            Whether the server has everything.
        """
        if self._thread is None:
            return self.state == "off"
        self.end(status)
        self._thread.join(timeout_seconds)
        return self.state == "ended"

    def abandon(self) -> None:
        """Send nothing more, and move no position on: somebody else does, or nobody."""
        self._abandoned.set()
        self._finishing.set()

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    # --- the thread ---

    def _main(self) -> None:
        with ExitStack() as held:
            pause, locked, hurried = self._pace_seconds, False, False
            while not self._abandoned.is_set():
                status = self._final_status
                try:
                    if not locked:
                        self._lock(held)
                        locked = True
                    if self._step(status):
                        return
                    pause = self._pace_seconds
                except Exception as error:
                    # Whatever is wrong with tracking, the run goes on; the log keeps the points.
                    self._note(error)
                    if status is not None and not hurried:
                        pause, hurried = self._pace_seconds, True
                    (self._abandoned if status else self._finishing).wait(pause)
                    pause = min(pause * 2, RETRY_MOST_SECONDS)

    def _step(self, status: str | None) -> bool:
        """Send a piece, or wait for one; returns whether it is done for good."""
        sending = self._sending or self._connect()
        more = sending.send()
        self.dropped = sending.dropped
        if not more and status is not None:
            sending.end(status)
            self.state, self.problem = "ended", sending.refusal
            return True
        self.state, self.problem = ("sending" if more else "up to date"), sending.refusal
        if not more:
            self._finishing.wait(self._pace_seconds)
        return False

    def _lock(self, held: ExitStack) -> None:
        """Be the only one that sends this run, on this machine at least."""
        file = held.enter_context((self._folder / LOCK_FILE).open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ServerAway(SENT_BY_ANOTHER) from None

    def _connect(self) -> Sending:
        from ringworld_platform.mlflow_server import MlflowServer

        self._saved = TrackedRun.load(self._folder, self._uri)
        if self._anew:
            self._saved.offset, self._saved.ended, self._anew = 0, "", False
        sending = Sending(
            MlflowServer(self._uri), self._spec, self._run_id, self._folder, self._saved, self._save
        )
        sending.dropped = self.dropped
        sending.open()
        self._sending = sending
        return sending

    def _save(self) -> None:
        if not self._abandoned.is_set():
            self._saved.save(self._folder)

    def _note(self, error: Exception) -> None:
        self._sending = None
        if isinstance(error, Gone) and (self._saved.parent or self._saved.offset):
            logger.warning("MLflow at %s began anew: %s is sent again", self._uri, self._run_id)
            self._saved.forget_server()
            self._save()
            self.dropped = 0
        line = one_line(str(error) or type(error).__name__)
        if line != self.problem:
            logger.warning(
                "MLflow at %s: %s; metrics stay in %s and are sent when it works again",
                one_line(self._uri),
                line,
                self._folder / METRICS_FILE,
            )
        self.state, self.problem = "unreachable", line
