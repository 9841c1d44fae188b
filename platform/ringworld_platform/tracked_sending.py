"""Sending one run's metric log to one MLflow server, piece by piece, each as often as need be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ringworld_jobs.any_job import Job
from ringworld_platform.mlflow_errors import Refused, TrackingError
from ringworld_platform.model_versions import model_version
from ringworld_platform.run_records import (
    METRICS_FILE,
    PLOTS_FOLDER,
    REPORT_FILE,
    SPEC_FILE,
    Record,
    read_lines,
    read_run,
)
from ringworld_platform.tracked_records import Point, border_points, files_of, points_of, time_of
from ringworld_platform.tracked_run import TrackedRun, flatten, mark_of

if TYPE_CHECKING:
    from ringworld_platform.mlflow_server import MlflowServer

logger = logging.getLogger(__name__)

READ_LIMIT_BYTES = 256 * 1024
_ENDED = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "STOPPED": "KILLED"}


@dataclass(slots=True)
class Sending:
    """One run on one server. Whatever is sent twice is there once.

    Attributes:
        server: where to.
        spec: of the job.
        run_id: name of the job's run there.
        folder: of the run.
        saved: what is sent already; changed in place.
        keep: saves ``saved``.
        dropped: metrics that the server refused, and lines of the log that cannot be read.
        refusal: what else it refused last, in one line: an artifact, a model version.
    """

    server: MlflowServer
    spec: Job
    run_id: str
    folder: Path
    saved: TrackedRun
    keep: Callable[[], None]
    dropped: int = 0
    refusal: str | None = None

    def open(self) -> None:
        """Find or make the job's run, and show it as running."""
        saved, log = self.saved, self.folder / METRICS_FILE
        if not saved.matches(log):
            logger.info("%s is not the log that was sent before; it is sent anew", log)
            saved.offset, saved.mark = 0, ""
        self.keep()
        first = read_lines(log, 0, 1).records
        begun = time_of(first[0]) if first else None
        if not saved.experiment_id:
            saved.experiment_id = self.server.experiment(self.spec.tracking.experiment)
        if not saved.parent:
            saved.parent = self._run("job", self.run_id, begun)
        if self._has_all():
            self.server.is_running(saved.parent)  # raises where it began anew
            return
        self.server.reopen(saved.parent)
        saved.ended = ""
        if not saved.params_logged:
            self.server.params(saved.parent, flatten(self.spec.model_dump(mode="json")))
            saved.params_logged = True
        self.keep()

    def _has_all(self) -> bool:
        """Whether the server has had the end of the run, and nothing came after that."""
        saved, log = self.saved, self.folder / METRICS_FILE
        more = log.is_file() and log.stat().st_size > saved.offset
        return bool(saved.ended) and not (more or saved.unregistered)

    def send(self) -> bool:
        """Send one bounded piece of the log; returns whether there may be more."""
        saved, log = self.saved, self.folder / METRICS_FILE
        lines = read_lines(log, saved.offset, READ_LIMIT_BYTES)
        if lines.offset == saved.offset:
            return False
        of_stages = [record for record in lines.records if "stage_index" in record]
        dropped = lines.broken
        points: dict[str, list[Point]] = {}
        for record in of_stages:
            found = points_of(record)
            points.setdefault(self._stage_run(record), []).extend(found)
            points.setdefault(saved.parent, []).extend([*found, *border_points(record, self.spec)])
        for run, batch in points.items():
            dropped += self.server.points(run, batch)
        for record in of_stages:
            self._tell(record)
        self.dropped += dropped
        saved.offset, saved.mark = lines.offset, mark_of(log, lines.offset)
        self.keep()
        self._register()
        return True

    def end(self, status: str) -> None:
        """Send the spec, the plots and the report, and end the runs.

        Args:
            status: SUCCEEDED, FAILED or STOPPED.
        """
        saved, ended = self.saved, _ENDED.get(status, "FAILED")
        if saved.ended == status and self._has_all():
            return
        self._register()
        self._write_report(status)
        names = [name for name in (SPEC_FILE, REPORT_FILE) if (self.folder / name).is_file()]
        plots = sorted((self.folder / PLOTS_FOLDER).glob("*.png"))
        files = [(self.folder / name, "") for name in names]
        self._files(saved.parent, [*files, *((path, PLOTS_FOLDER) for path in plots)])
        when = saved.time or None
        for run in saved.stages.values():
            if self.server.is_running(run):
                self.server.end(run, ended, when)
        self.server.end(saved.parent, ended, when)
        self.server.remove_strangers(
            saved.experiment_id, saved.key, [saved.parent, *saved.stages.values()]
        )
        saved.ended = status
        self.keep()

    # --- one record ---

    def _tell(self, record: Record) -> None:
        """What a record says besides its points."""
        saved, run, kind = self.saved, self._stage_run(record), record.get("kind")
        attempt = int(record.get("attempt", saved.attempt))
        if attempt != saved.attempt:
            self.server.tag(saved.parent, "attempt", str(attempt))
            saved.attempt = attempt
        if kind == "step":
            saved.tokens = int(record.get("tokens", saved.tokens))
        saved.time = max(saved.time, time_of(record))
        if kind == "stage_start":
            self.server.reopen(run)
            self.server.tag(run, "attempt", str(attempt))
        if kind == "parity":
            self.server.tag(run, "parity", "passed" if record.get("passed") else "failed")
        self._files(run, files_of(record, self.folder))
        if kind == "stage_end":
            self.server.end(run, "FINISHED", time_of(record) or None)
            self._draw(run, int(record["stage_index"]))
            ended = {**record, "tokens": saved.tokens}
            if ended not in saved.unregistered:
                saved.unregistered.append(ended)

    def _register(self) -> None:
        """Make model versions of the checkpoints that are none yet.

        A registry that is out of order does not hold up the log: it is tried again later.
        """
        saved = self.saved
        for record in list(saved.unregistered):
            version = model_version(self.spec, self.run_id, record, int(record["tokens"]))
            try:
                if version is not None:
                    self.server.register(self._stage_run(record), version)
            except TrackingError as error:
                self.server.is_running(saved.parent)  # raises where it is the server
                self._refused(f"no model version of {record.get('checkpoint')}: {error}")
                if not isinstance(error, Refused):
                    continue
            saved.unregistered.remove(record)
            self.keep()

    def _draw(self, run: str, index: int) -> None:
        """Draw the curves up to a stage's end: on its run as they were, on the job's the newest."""
        from ringworld_platform.plots import write_learning_curves

        try:
            records = read_run(self.folder)
            known = [r for r in records.records if int(r.get("stage_index", 0)) <= index]
            paths = write_learning_curves(replace(records, records=known))
        except Exception as error:
            logger.warning("no plots of %s: %s", self.run_id, error)
            return
        for where in (run, self.saved.parent):
            self._files(where, [(path, PLOTS_FOLDER) for path in paths])

    def _files(self, run: str, paths: Iterable[tuple[Path, str]]) -> None:
        try:
            self.server.files(run, paths)
        except Refused as error:
            self._refused(str(error))

    def _refused(self, text: str) -> None:
        if text != self.refusal:
            logger.warning("MLflow refuses: %s", text)
        self.refusal = text

    # --- runs ---

    def _stage_run(self, record: Record) -> str:
        index = int(record["stage_index"])
        key, saved = str(index), self.saved
        if key not in saved.stages:
            name = f"{index}-{record.get('stage', 'stage')}"
            run = self._run(f"stage {index}", name, time_of(record) or None)
            if index < len(self.spec.stages):
                stage = self.spec.stages[index]
                self.server.params(run, flatten(stage.model_dump(mode="json")))
            saved.stages[key] = run
            self.keep()
        return saved.stages[key]

    def _run(self, role: str, name: str, begun: float | None) -> str:
        from ringworld_platform.mlflow_server import KEY_TAG, ROLE_TAG

        saved = self.saved
        tags = {
            KEY_TAG: saved.key,
            ROLE_TAG: role,
            "ringworld.run_id": self.run_id,
            "ringworld.run_folder": str(self.folder),
        }
        if saved.parent:
            tags["mlflow.parentRunId"] = saved.parent
        return self.server.find_or_create(saved.experiment_id, name, tags, begun)

    def _write_report(self, status: str) -> None:
        from ringworld_platform.report import write_report

        try:
            write_report(self.folder, state=status)
        except Exception as error:
            logger.warning("no report for %s: %s", self.run_id, error)
