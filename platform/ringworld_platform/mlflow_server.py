"""One MLflow server as tracking uses it: the only module that imports MLflow.

Importing it takes seconds, and so does a call to a server that is away: this is for the process of
``tracking_process`` and for ``ringworld track``, never for the controller's.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlflow.entities import Metric, Param, Run, ViewType
from mlflow.entities.model_registry import ModelVersion as RegisteredVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ringworld_platform.mlflow_errors import Refused, ServerAway, judge, one_line
from ringworld_platform.model_versions import ModelVersion
from ringworld_platform.tracked_records import Point

logger = logging.getLogger(__name__)

BATCH_LIMIT_METRICS = 1000
PARAM_BATCH = 100
# Below the longest that MLflow's stores take.
_NAME_LIMIT = 250
_SQLITE = "sqlite:///"
_NOT_IN_NAMES = re.compile(r"[^\w\-./: ]")
KEY_TAG, ROLE_TAG = "ringworld.key", "ringworld.role"
# A server that is down must cost seconds, not MLflow's default of four minutes a call. A request
# that had no answer is not repeated before it is known what became of it.
_CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextmanager
def _judged() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise judge(error.error_code, str(error.message)) from error


class MlflowServer:
    """Runs and models on one tracking server.

    Every method may raise ``Gone``, ``Refused`` or ``ServerAway``. All can be repeated: what is
    there already stays once.
    """

    def __init__(self, uri: str) -> None:
        """Take a server; nothing is asked of it yet.

        Args:
            uri: tracking URI.

        Raises:
            ServerAway: it is a sqlite file that cannot be opened.
        """
        for name, value in _CLIENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._file = Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
        if self._file is not None:
            _check_sqlite(self._file)
        with _judged():
            self._client = MlflowClient(tracking_uri=uri)

    # --- runs ---

    def experiment(self, name: str) -> str:
        """Id of an experiment, which is made where there is none."""
        with _judged():
            found = self._client.get_experiment_by_name(name)
            if found is None:
                location = None
                if self._file is not None:
                    # Without a location MLflow writes ./mlruns into the working directory.
                    location = (self._file.parent.absolute() / "mlflow-artifacts").as_uri()
                # The kind has MLflow's page open on training runs, not on its pages for agents.
                tags = {"mlflow.experimentKind": "custom_model_development"}
                try:
                    return self._client.create_experiment(
                        name, artifact_location=location, tags=tags
                    )
                except MlflowException:
                    found = self._client.get_experiment_by_name(name)  # somebody was faster
                    if found is None:
                        raise
        return found.experiment_id

    def find_or_create(
        self, experiment: str, name: str, tags: Mapping[str, str], start_seconds: float | None
    ) -> str:
        """Id of the run with the ``KEY_TAG`` and ``ROLE_TAG`` of ``tags``.

        Args:
            experiment: its experiment's id.
            name: what a new one is called.
            tags: of a new one.
            start_seconds: when it began (epoch); None: now.
        """
        with _judged():
            for run in self._runs(experiment, tags[KEY_TAG]):
                if run.data.tags.get(ROLE_TAG) == tags[ROLE_TAG]:
                    return run.info.run_id
            start = None if start_seconds is None else int(start_seconds * 1000)
            made = self._client.create_run(
                experiment, start_time=start, run_name=name, tags=dict(tags)
            )
            return made.info.run_id

    def reopen(self, run: str) -> None:
        """Show a run as running."""
        with _judged():
            self._client.update_run(run, status="RUNNING")

    def end(self, run: str, status: str, end_seconds: float | None) -> None:
        """Show a run as ended: FINISHED, FAILED or KILLED."""
        end = None if end_seconds is None else int(end_seconds * 1000)
        with _judged():
            self._client.set_terminated(run, status, end)

    def is_running(self, run: str) -> bool:
        """Whether a run is shown as running."""
        with _judged():
            return self._client.get_run(run).info.status == "RUNNING"

    def tag(self, run: str, key: str, value: str) -> None:
        """Set a tag of a run."""
        with _judged():
            self._client.set_tag(run, key, value)

    def params(self, run: str, params: Mapping[str, str]) -> int:
        """Log parameters; returns how many are refused, as those that have another value are."""
        return self._in_parts(run, [Param(*item) for item in params.items()], PARAM_BATCH)

    def points(self, run: str, points: Sequence[Point]) -> int:
        """Log points; returns how many are refused."""
        metrics = [
            Metric(
                _NOT_IN_NAMES.sub("_", p.name)[:_NAME_LIMIT], p.value, int(p.time * 1000), p.step
            )
            for p in points
        ]
        return self._in_parts(run, metrics, BATCH_LIMIT_METRICS)

    def files(self, run: str, paths: Iterable[tuple[Path, str]]) -> None:
        """Log files.

        Args:
            run: the run's id.
            paths: each a file, and the folder of the run's artifacts that it goes to.

        Raises:
            Refused: the server is well, and its artifacts' store is not.
        """
        for path, folder in paths:
            with self._storing(run, path.name):
                self._client.log_artifact(run, str(path), folder or None)

    def remove_strangers(self, experiment: str, key: str, ours: Iterable[str]) -> None:
        """Delete the runs of this key that are not ours.

        A frozen server may create a run long after it was given up and another one was made.
        """
        kept = frozenset(ours)
        with _judged():
            for run in self._runs(experiment, key):
                if run.info.run_id not in kept:
                    self._client.delete_run(run.info.run_id)

    @contextmanager
    def _storing(self, run: str, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Storage raises whatever its client raises; a server that is away raises here.
            with _judged():
                self._client.get_run(run)
            raise Refused(f"the artifact {name}: {one_line(str(error))}") from error

    def _runs(self, experiment: str, key: str) -> list[Run]:
        """The runs of a key, oldest first."""
        return list(
            self._client.search_runs(
                [experiment],
                filter_string=f"tags.`{KEY_TAG}` = '{key}'",
                run_view_type=ViewType.ACTIVE_ONLY,
                order_by=["attributes.start_time ASC"],
            )
        )

    def _in_parts(self, run: str, items: Sequence[Metric | Param], most: int) -> int:
        refused = 0
        for first in range(0, len(items), most):
            refused += self._batch(run, items[first : first + most])
        return refused

    def _batch(self, run: str, items: Sequence[Metric | Param]) -> int:
        """Send one request's worth; what is refused is halved until the bad ones stand alone."""
        metrics = [item for item in items if isinstance(item, Metric)]
        params = [item for item in items if isinstance(item, Param)]
        try:
            with _judged():
                self._client.log_batch(run, metrics=metrics, params=params)
            return 0
        except Refused as error:
            with _judged():
                if self._client.get_run(run).info.lifecycle_stage == "deleted":
                    raise ServerAway(
                        f"the run {run} was deleted there; restore it, or remove mlflow.json from "
                        "the run's folder to send it anew"
                    ) from error
            if len(items) == 1:
                kind = type(items[0]).__name__.lower()
                logger.warning("MLflow refuses %s %s: %s", kind, items[0].key, error)
                return 1
            half = len(items) // 2
            return self._batch(run, items[:half]) + self._batch(run, items[half:])

    # --- models ---

    def register(self, run: str, version: ModelVersion) -> None:
        """Make a checkpoint a version of its registered model, once.

        Raises:
            Refused: this server has no registry, or does not let us.
        """
        with _judged():
            try:
                self._client.create_registered_model(version.model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            there = self._versions(run, version)
            if not there:
                there = [self._create_version(run, version)]
            number = min(int(found.version) for found in there)
            for found in there:
                # A frozen server may have made one after it was given up.
                if int(found.version) != number:
                    self._client.delete_model_version(version.model, str(found.version))
            aliases: Mapping[str, str] = self._client.get_registered_model(version.model).aliases
            if int(aliases.get(version.alias, 0)) < number:
                self._client.set_registered_model_alias(version.model, version.alias, str(number))

    def _versions(self, run: str, version: ModelVersion) -> list[RegisteredVersion]:
        found = self._client.search_model_versions(
            f"name = '{version.model}' and run_id = '{run}'", max_results=1000
        )
        return [one for one in found if one.tags.get("checkpoint") == version.url]

    def _create_version(self, run: str, version: ModelVersion) -> RegisteredVersion:
        if self._file is not None or not version.url.startswith("file://"):
            return self._create_from(run, version, version.url)
        # A server takes no path of this machine; it takes what is in the run's artifacts.
        with self._storing(run, "checkpoint.json"):
            self._client.log_dict(run, dict(version.tags), "checkpoint/checkpoint.json")
        return self._create_from(run, version, f"runs:/{run}/checkpoint")

    def _create_from(self, run: str, version: ModelVersion, source: str) -> RegisteredVersion:
        return self._client.create_model_version(
            version.model,
            source,
            run,
            tags=dict(version.tags),
            description=version.description,
            await_creation_for=0,
        )


def _check_sqlite(path: Path) -> None:
    """Open the file; MLflow itself would try for minutes before it says what is wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=5)
        try:
            database.execute("pragma schema_version").fetchone()
        finally:
            database.close()
    except (OSError, sqlite3.Error) as error:
        raise ServerAway(f"{path}: {error}") from error
