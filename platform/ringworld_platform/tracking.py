"""MLflow tracking: replays the metric log to a server, and never stands in training's way.

``metrics.jsonl`` is the truth and is written first, by others. A thread here reads it from the
last acknowledged byte, sends what it finds in batches and saves the new position, so that a
server's outage is a gap that is filled later and a restart neither loses nor repeats a point.
One parent run a job (x axis: the job's steps), one child run a stage (x axis: the stage's steps),
the same ones over restarts and resumes. This is the only module that imports MLflow, and it does
so in its thread, because the import alone takes seconds.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ringworld_jobs.spec import JobSpec
from ringworld_platform.run_records import (
    METRICS_FILE,
    PLOTS_FOLDER,
    REPORT_FILE,
    SPEC_FILE,
    Record,
    numbers,
    read_lines,
)
from ringworld_platform.tracked_run import TrackedRun, flatten

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

READ_LIMIT_BYTES = 256 * 1024
BATCH_LIMIT_METRICS = 1000
PARAM_BATCH = 100
RETRY_MOST_SECONDS = 60.0

State = Literal["off", "starting", "sending", "up to date", "unreachable", "ended"]

# A record's identity is its run, step and time, not a series.
_IDENTITY = frozenset({"kind", "stage", "stage_index", "step", "global_step", "time"})
_STATUS = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "STOPPED": "KILLED"}
# A server that is down must cost seconds, not MLflow's default of four minutes a call.
_CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Tracker:
    """Sends one run's metric log to MLflow from a thread of its own.

    No method raises for a server's trouble, and none but ``finish`` waits.
    """

    def __init__(
        self, run_folder: Path, spec: JobSpec, run_id: str, *, pace_seconds: float = 2.0
    ) -> None:
        """Prepare; nothing is read, imported or sent yet.

        Args:
            run_folder: holds metrics.jsonl; mlflow.json is kept there.
            spec: the resolved job spec; ``tracking.mlflow`` says where to send.
            run_id: name of the parent run.
            pace_seconds: least time between two sends (points gather meanwhile), and the pause
                after a first failure, which doubles up to a minute.
        """
        self._folder = run_folder.absolute()
        self._spec = spec
        self._run_id = run_id
        self._pace_seconds = pace_seconds
        self._wake = threading.Event()
        self._finishing = threading.Event()
        self._abandoned = threading.Event()
        self._final_status: str | None = None
        self._thread: threading.Thread | None = None
        self._saved = TrackedRun()
        self._off = spec.tracking.mlflow == "off"
        self.state: State = "off" if self._off else "starting"
        self.problem: str | None = None
        """Why the server is unreachable, in one line."""
        self.dropped = 0
        """Metrics that the server refused, and lines of the log that cannot be read."""

    def start(self) -> None:
        """Start the thread. Does nothing when tracking is off or it runs already."""
        if self._off or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="ringworld-tracking", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        """Say that metrics.jsonl has new lines. Takes microseconds."""
        self._wake.set()

    def finish(self, status: str, timeout_seconds: float = 30.0) -> bool:
        """Send what is left, the spec, the plots and the report, and end the MLflow runs.

        Args:
            status: SUCCEEDED, FAILED or STOPPED.
            timeout_seconds: longest wait; what is not sent by then stays in metrics.jsonl, and
                the next tracker of this run folder sends it.

        Returns:
            Whether the server has everything.
        """
        if self._thread is None:
            return self._off
        self._final_status = status
        self._finishing.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            # A later tracker of this folder must be the only one that moves the position on.
            self._abandoned.set()
        return self.state == "ended"

    def abandon(self) -> None:
        """Send nothing more, and move no position on: somebody else does, or nobody."""
        self._abandoned.set()
        self._finishing.set()
        self._wake.set()

    # --- the thread ---

    def _run(self) -> None:
        client: MlflowClient | None = None
        pause = self._pace_seconds
        while not self._abandoned.is_set():
            self._wake.clear()
            status = self._final_status
            try:
                client = client or self._connect()
                more = self._send(client)
                if not more and status is not None:
                    self._end(client, status)
                    self.state, self.problem = "ended", None
                    return
                self.state, self.problem = ("sending" if more else "up to date"), None
                pause = self._pace_seconds
                if not more:
                    self._wake.wait()
                    self._finishing.wait(self._pace_seconds)
            except Exception as error:
                # Whatever is wrong with tracking, the run goes on and the log keeps the points.
                client = None
                self._report_problem(error)
                hurry = self._finishing if status is None else self._abandoned
                hurry.wait(pause)
                pause = min(pause * 2, RETRY_MOST_SECONDS)

    def _report_problem(self, error: Exception) -> None:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if line != self.problem:
            logger.warning(
                "MLflow at %s: %s; metrics stay in %s and are sent when it answers again",
                self._uri(),
                line,
                self._folder / METRICS_FILE,
            )
        self.state, self.problem = "unreachable", line

    def _uri(self) -> str:
        uri = self._spec.tracking.mlflow
        return f"sqlite:///{self._folder / 'mlflow.db'}" if uri == "auto" else uri

    def _connect(self) -> MlflowClient:
        for name, value in _CLIENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        uri = self._uri()
        if uri.startswith("sqlite:///"):
            check_sqlite(Path(uri.removeprefix("sqlite:///")))
        self._saved = TrackedRun.load(self._folder, uri)
        self._save()
        client = MlflowClient(tracking_uri=uri)
        if not self._saved.experiment_id:
            self._saved.experiment_id = self._experiment(client, uri)
        if not self._saved.parent:
            self._saved.parent = self._find_or_create(client, "job", self._run_id, None)
        client.update_run(self._saved.parent, status="RUNNING")
        self._log_params(client)
        self._save()
        return client

    def _save(self) -> None:
        if not self._abandoned.is_set():
            self._saved.save(self._folder)

    def _experiment(self, client: MlflowClient, uri: str) -> str:
        from mlflow.exceptions import MlflowException

        name = self._spec.tracking.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            location = None
            if uri.startswith("sqlite:///"):
                # Without a location MLflow writes ./mlruns into the working directory.
                database = Path(uri.removeprefix("sqlite:///"))
                location = (database.parent.absolute() / "mlflow-artifacts").as_uri()
            try:
                # The kind has MLflow's page open on training runs, not on its pages for agents.
                tags = {"mlflow.experimentKind": "custom_model_development"}
                return client.create_experiment(name, artifact_location=location, tags=tags)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # somebody else was faster
                if found is None:
                    raise
        return found.experiment_id

    def _find_or_create(
        self, client: MlflowClient, role: str, name: str, parent: str | None
    ) -> str:
        saved = self._saved
        query = f"tags.`ringworld.key` = '{saved.key}' and tags.`ringworld.role` = '{role}'"
        for run in client.search_runs([saved.experiment_id], filter_string=query, max_results=1):
            return run.info.run_id
        tags = {
            "ringworld.key": saved.key,
            "ringworld.role": role,
            "ringworld.run_id": self._run_id,
            "ringworld.run_folder": str(self._folder),
        }
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        return client.create_run(saved.experiment_id, run_name=name, tags=tags).info.run_id

    def _stage_run(self, client: MlflowClient, record: Record) -> str:
        index = int(record["stage_index"])
        key = str(index)
        if key not in self._saved.stages:
            name = f"{index}-{record.get('stage', 'stage')}"
            run = self._find_or_create(client, f"stage {index}", name, self._saved.parent)
            if index < len(self._spec.stages):
                self._params(client, run, self._spec.stages[index].model_dump(mode="json"))
            self._saved.stages[key] = run
            self._save()
        return self._saved.stages[key]

    def _log_params(self, client: MlflowClient) -> None:
        if not self._saved.params_logged:
            self._params(client, self._saved.parent, self._spec.model_dump(mode="json"))
            self._saved.params_logged = True

    @staticmethod
    def _params(client: MlflowClient, run: str, data: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in flatten(data).items()]
        for first in range(0, len(params), PARAM_BATCH):
            client.log_batch(run, params=params[first : first + PARAM_BATCH])

    def _send(self, client: MlflowClient) -> bool:
        """Send one bounded piece of the log; returns whether there may be more."""
        saved = self._saved
        lines = read_lines(self._folder / METRICS_FILE, saved.offset, READ_LIMIT_BYTES)
        if lines.offset == saved.offset:
            return False
        self.dropped += lines.broken
        points: dict[str, list[Metric]] = {}
        for record in lines.records:
            self._collect(client, record, points)
        for run, metrics in points.items():
            for first in range(0, len(metrics), BATCH_LIMIT_METRICS):
                self._log_batch(client, run, metrics[first : first + BATCH_LIMIT_METRICS])
        for record in lines.records:
            if record.get("kind") == "stage_end" and "stage_index" in record:
                client.set_terminated(self._stage_run(client, record), "FINISHED")
        saved.offset = lines.offset
        self._save()
        return True

    def _collect(
        self, client: MlflowClient, record: Record, points: dict[str, list[Metric]]
    ) -> None:
        from mlflow.entities import Metric

        if "stage_index" not in record:
            return
        kind = str(record.get("kind"))
        stage_run = self._stage_run(client, record)
        parent = self._saved.parent
        attempt = int(record.get("attempt", self._saved.attempt))
        if attempt != self._saved.attempt:
            client.set_tag(parent, "attempt", str(attempt))
            self._saved.attempt = attempt
        if kind == "stage_start":
            client.update_run(stage_run, status="RUNNING")
            client.set_tag(stage_run, "attempt", str(attempt))
        if kind == "parity":
            client.set_tag(stage_run, "parity", "passed" if record.get("passed") else "failed")
        if kind not in ("step", "validation", "checkpoint", "parity"):
            return
        prefix = "" if kind == "step" else f"{kind}/"
        # Fixed by the record, so that a piece sent twice is the same points again.
        time = int(float(record.get("time", 0.0)) * 1000)
        stage_step = int(record.get("step", 0))
        job_step = int(record.get("global_step", stage_step))
        for name, value in numbers(record, _IDENTITY):
            key = f"{prefix}{name}"
            points.setdefault(stage_run, []).append(Metric(key, value, time, stage_step))
            points.setdefault(parent, []).append(Metric(key, value, time, job_step))

    def _log_batch(self, client: MlflowClient, run: str, metrics: list[Metric]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.log_batch(run, metrics=metrics)
        except MlflowException as error:
            # Sending refused data again would only block all that comes after it.
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self.dropped += len(metrics)
            logger.warning("MLflow refused %d metrics: %s", len(metrics), error.message)

    def _end(self, client: MlflowClient, status: str) -> None:
        saved = self._saved
        self._write_report(status)
        for name in (SPEC_FILE, REPORT_FILE):
            if (self._folder / name).is_file():
                client.log_artifact(saved.parent, str(self._folder / name))
        if (self._folder / PLOTS_FOLDER).is_dir():
            client.log_artifacts(saved.parent, str(self._folder / PLOTS_FOLDER), PLOTS_FOLDER)
        ended = _STATUS.get(status, "FAILED")
        for run in saved.stages.values():
            if client.get_run(run).info.status == "RUNNING":
                client.set_terminated(run, ended)
        client.set_terminated(saved.parent, ended)

    def _write_report(self, status: str) -> None:
        from ringworld_platform.report import write_report

        try:
            write_report(self._folder, state=status)
        except Exception as error:
            logger.warning("no report for %s: %s", self._run_id, error)


def check_sqlite(path: Path) -> None:
    """Open a sqlite file; MLflow itself would try for minutes before it says what is wrong.

    Raises:
        OSError: its folder cannot be made.
        sqlite3.Error: it cannot be opened or is no database.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=5)
    try:
        database.execute("pragma schema_version").fetchone()
    finally:
        database.close()
