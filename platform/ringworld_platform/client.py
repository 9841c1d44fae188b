"""What the command line uses: the controller's methods as plain, synchronous calls."""

from __future__ import annotations

import builtins
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ringworld_jobs.any_job import Job
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.model_job import ModelJob
from ringworld_jobs.spec import JobSpec
from ringworld_platform.errors import ClusterError, PlatformError
from ringworld_platform.run_folder import Page
from ringworld_platform.run_state import TERMINAL
from ringworld_platform.runs_roots import USERS_LIST

RETRY_SECONDS = 30.0
RETRY_PAUSE_SECONDS = 0.2
# The controller answers in milliseconds, but for what has to ask a store or wait for a run's end.
CALL_SECONDS = 60.0
LONG_SECONDS = 300.0
WAIT_PAUSE_SECONDS = 0.2
CONTROLLER_THREADS = 16
# A node that an autoscaler has added could not go as long as the controller lived there, or would
# take it along; of the head, which Ray marks with this resource, neither is true.
ON_THE_HEAD = {"node:__internal_head__": 0.001}
STATUSES = builtins.list[dict[str, Any]]

T = TypeVar("T")


class Client:
    """Speaks to the cluster's controller. Ray must be connected: see ``cluster``."""

    def __init__(self, controller: Any, runs_root: Path) -> None:
        """Take a handle; ``attach`` finds or makes one."""
        self._controller = controller
        self._runs_root = runs_root

    @classmethod
    def attach(
        cls,
        runs_root: Path | None = None,
        *,
        create: bool = True,
        one_shot: bool = False,
        runner: Any = None,
        roots_file: str | None = None,
    ) -> Client:
        """Find the cluster's controller, or make it.

        Args:
            runs_root: folder of the runs that this client submits; default ``./runs``.
            create: make a controller where there is none.
            one_shot: the cluster lives for one command (``ringworld run``): a job that it can
                never hold fails, and runs that a dead cluster left are not continued unasked.
            runner: how runs behave (``RunnerConfig``), in place of the default.
            roots_file: list of folders of runs whose unfinished ones the controller goes on with;
                default: the user's, unless it is one-shot or its runs behave in another way.

        Raises:
            ClusterError: Ray is not connected; or there is no controller and create is False.
        """
        import ray

        from ringworld_platform.controller import CONTROLLER_NAME, Controller, ControllerConfig
        from ringworld_platform.gang import NAMESPACE
        from ringworld_platform.runner_config import RunnerConfig

        if not ray.is_initialized():
            raise ClusterError("not connected to a Ray cluster; connect to one first")
        root = (runs_root or Path("runs")).absolute()
        if not create:
            try:
                return cls(ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE), root)
            except ValueError as error:
                raise ClusterError(
                    "no job was submitted to this cluster yet; `ringworld submit JOB` does"
                ) from error
        if roots_file is None:
            roots_file = USERS_LIST if runner is None and not one_shot else ""
        config = ControllerConfig(
            controller_id=uuid.uuid4().hex,
            runs_root=str(root),
            runner=runner or RunnerConfig(one_shot=one_shot),
            roots_file=roots_file,
        )
        # Ray's annotations know no detached actors.
        remote: Any = ray.remote(Controller)
        controller = remote.options(
            name=CONTROLLER_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=ON_THE_HEAD,
            max_restarts=-1,
            max_concurrency=CONTROLLER_THREADS,
        ).remote(config)
        return cls(controller, root)

    def submit(self, spec: Job, *, base: Path | None = None) -> str:
        """Hand in a job.

        Args:
            spec: the resolved spec.
            base: folder that its relative paths are meant from; default the working directory.

        Returns:
            The run's id. The same spec, while its run is unfinished, gives the same run.

        Raises:
            JobTooLarge: the cluster can never hold it.
            StoreRefused: its checkpoints could not be written; nothing is left behind.
            PlatformError: the run that `model.init_from` means has no such checkpoint, or the model
                that is to be asked is not there.
            RunConflictError: another controller has a run of this very job in hand.
        """
        folder = base or Path.cwd()
        meant = _settled(absolute_paths(spec, folder), folder)
        data = meant.model_dump(mode="json", exclude_none=True)
        root, request = str(runs_root_of(meant, folder)), uuid.uuid4().hex
        return str(self._call(lambda c: c.submit.remote(data, root, request), LONG_SECONDS))

    def status(self, name: str) -> dict[str, Any]:
        """State of a run, by run id or by job name (its newest run).

        Raises:
            UnknownRunError: neither exists.
        """
        return dict(self._call(lambda c: c.status.remote(name)))

    def list(self) -> STATUSES:
        """State of every run, oldest first."""
        return builtins.list(self._call(lambda c: c.runs.remote()))

    def stop(self, name: str) -> str:
        """Ask a run to save a checkpoint and stop; returns its id at once.

        Raises:
            RunConflictError: it has ended already.
        """
        return str(self._call(lambda c: c.stop.remote(name), LONG_SECONDS))

    def resume(self, name: str, *, older: bool = False) -> str:
        """Go on with a stopped, failed or abandoned run; returns its id.

        Args:
            name: a run's id, a job's name, or the url of a run in its store on S3, whose folder
                is made among this client's runs if it is not there.
            older: where the newest checkpoint is damaged, set it aside and take an older one.

        Raises:
            StoreRefused: its checkpoints could not be written.
            RunConflictError: it is at work, or has succeeded.
        """
        request, root = uuid.uuid4().hex, str(self._runs_root)
        ask = lambda c: c.resume.remote(name, older, request, root)  # noqa: E731
        return str(self._call(ask, LONG_SECONDS))

    def events(self, name: str, after: int = 0) -> STATUSES:
        """Events with a ``seq`` above ``after``."""
        return builtins.list(self._call(lambda c: c.events.remote(name, after)))

    def metrics(self, name: str, after: int = 0) -> Page:
        """Metric records from position ``after`` on; read on from the page's ``next``."""
        page: Page = self._call(lambda c: c.metrics.remote(name, after))
        return page

    def logs(self, name: str, rank: int = 0, after: int = 0) -> Page:
        """Lines of a rank's log from position ``after`` on."""
        page: Page = self._call(lambda c: c.logs.remote(name, rank, after))
        return page

    def log_ends(self, name: str) -> dict[int, int]:
        """The ranks that have a log, and the place behind its last line."""
        return dict(self._call(lambda c: c.log_ends.remote(name)))

    def spec(self, name: str) -> dict[str, Any]:
        """The resolved spec of a run as plain data; empty where it cannot be read."""
        return dict(self._call(lambda c: c.spec.remote(name)))

    def wait(self, name: str, *, timeout_seconds: float | None = None) -> dict[str, Any]:
        """Wait until a run has ended; returns its status, or the last one seen at the timeout."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            status = self.status(name)
            if status["state"] in TERMINAL:
                return status
            if deadline is not None and time.monotonic() >= deadline:
                return status
            time.sleep(WAIT_PAUSE_SECONDS)

    def shutdown(self) -> None:
        """End the controller and its gangs; unfinished runs stay resumable."""
        import ray

        self._call(lambda c: c.shutdown.remote(), LONG_SECONDS)
        ray.kill(self._controller, no_restart=True)

    def _call(self, ask: Callable[[Any], Any], seconds: float = CALL_SECONDS) -> Any:
        """Ask the controller, again while Ray starts it anew after a crash.

        Args:
            ask: makes the call; made again, it must mean the same.
            seconds: longest wait for an answer.
        """
        import ray
        from ray.exceptions import (
            ActorUnavailableError,
            GetTimeoutError,
            RayActorError,
            RayTaskError,
        )

        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                return ray.get(ask(self._controller), timeout=seconds)
            except GetTimeoutError as error:
                raise ClusterError(
                    f"the controller is there but has not answered for {seconds:g} s; its log, in "
                    "the Ray dashboard, may say what it waits for"
                ) from error
            except ActorUnavailableError as error:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the controller has not answered for {RETRY_SECONDS:g} s; "
                        "look for it in the Ray dashboard"
                    ) from error
                time.sleep(RETRY_PAUSE_SECONDS)
            except RayActorError as error:
                raise ClusterError(f"the controller is gone: {_first_line(error)}") from error
            except RayTaskError as error:
                if isinstance(error.cause, PlatformError):
                    raise error.cause from None
                raise


def absolute_paths(spec: Job, base: Path) -> Job:
    """The spec with every relative path made absolute, so that it means the same everywhere."""
    store = spec.checkpoint.model_copy(update={"store": _absolute(spec.checkpoint.store, base)})
    if isinstance(spec, GenerateSpec):
        out = spec.out
        if out is not None:
            out = _absolute(out if "://" in out else f"file://{out}", base)
        return spec.model_copy(update={"out": out, "checkpoint": store})
    data = spec.data
    recipe = None if data.recipe is None else _absolute(data.recipe, base)
    sources = {
        name: source.model_copy(update={"shards": _absolute(source.shards, base)})
        if source.shards is not None
        else source
        for name, source in data.sources.items()
    }
    folder = _absolute(data.shard_cache.folder, base)
    meant = data.model_copy(
        update={
            "recipe": recipe,
            "cache": _absolute(data.cache, base),
            "sources": sources,
            "shard_cache": data.shard_cache.model_copy(update={"folder": folder}),
        }
    )
    if not isinstance(spec, JobSpec):
        return spec.model_copy(update={"data": meant, "checkpoint": store})
    model, init_from = spec.model, spec.model.init_from or ""
    if init_from.startswith("run:file://"):
        place = _absolute(init_from.removeprefix("run:"), base)
        model = model.model_copy(update={"init_from": f"run:{place}"})
    return spec.model_copy(update={"model": model, "data": meant, "checkpoint": store})


def _settled(spec: Job, base: Path) -> Job:
    """The spec with the one checkpoint that its model means: `model.init_from: run:...`, say."""
    if isinstance(spec, ModelJob):
        from ringworld_platform.evaluated_model import settled_model

        return settled_model(spec, runs_root_of(spec, base))
    from ringworld_jobs.weights import settle_run
    from ringworld_model.hf_config import WeightsError
    from ringworld_platform.run_weights import find_run

    try:
        return settle_run(spec, find_run)
    except WeightsError as error:
        raise PlatformError(f"model.init_from = {spec.model.init_from!r}: {error}") from error


def runs_root_of(spec: Job, base: Path | None = None) -> Path:
    """Folder of a job's runs: where its checkpoints go, if that is a folder; else ``runs``."""
    folder = base or Path.cwd()
    scheme, separator, path = spec.checkpoint.store.partition("://")
    if separator and scheme == "file":
        return (folder / path).absolute()
    return (folder / "runs").absolute()


def _absolute(path: str, base: Path) -> str:
    """An absolute path or file url; other urls stay as they are."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return str((base / path).absolute())
    return f"file://{(base / rest).absolute()}" if scheme == "file" else path


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
