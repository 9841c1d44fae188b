"""The controller: the one actor of a cluster that holds its jobs.

Detached and without CPUs of its own, it outlives the command that made it. Whatever it knows is in
the run folders: killed and started again by Ray, it reads them and goes on with every run that was
its own, from the newest committed checkpoint.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ringworld_jobs.load import load_job
from ringworld_jobs.problem import JobSpecError
from ringworld_jobs.resolve import resolved_yaml, spec_digest
from ringworld_jobs.spec import JobSpec
from ringworld_platform.capacity import cluster
from ringworld_platform.drain import DrainWatch
from ringworld_platform.errors import PlatformError, RunConflictError, UnknownRunError
from ringworld_platform.fit import refuse_unfit
from ringworld_platform.job_queue import JobQueue
from ringworld_platform.job_runner import JobRunner
from ringworld_platform.live_run import LiveRun, claim, this_owner
from ringworld_platform.run_claims import RunClaims, check_store
from ringworld_platform.run_folder import Page, RunFolder
from ringworld_platform.run_records import SPEC_FILE
from ringworld_platform.run_state import JobRecord, RunState, RunStates, next_attempt
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.stage_setup import device_of

log = logging.getLogger(__name__)

CONTROLLER_NAME = "ringworld-controller"
RELEASE_SECONDS = 30.0
ADOPT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What a controller is made with; Ray keeps it, and hands it to each restart.

    Attributes:
        controller_id: unlike for any two controllers, the same over restarts of one.
        runs_root: absolute folder of the runs that were submitted first; what the controller
            must remember of its own is kept there.
        runner: how runs behave.
    """

    controller_id: str
    runs_root: str
    runner: RunnerConfig = field(default_factory=RunnerConfig)


class Controller:
    """Takes jobs, runs them, and answers questions about them. Its methods run in threads."""

    def __init__(self, config: ControllerConfig) -> None:
        """Take up again what an earlier life of this controller, or a dead cluster, left."""
        logging.basicConfig(level=logging.INFO)
        self._config = config
        self._lock = threading.RLock()
        self._cluster = partial(cluster, fixed=config.runner.one_shot)
        self._line = JobQueue(self._cluster)
        self._drains = DrainWatch()
        self._runners: dict[Path, JobRunner] = {}
        self._troubles: dict[str, str] = {}
        self._closing = threading.Event()
        self._roots = self._load_roots()
        with self._line.closed():
            self._take_up()
        if not config.runner.one_shot:
            threading.Thread(target=self._adopt_forever, name="adopt", daemon=True).start()

    def submit(self, spec: dict[str, Any], runs_root: str) -> str:
        """Take a job; the same spec, while its run is unfinished, gives the same run.

        Args:
            spec: the resolved spec as JSON data, paths absolute.
            runs_root: absolute folder of its runs.

        Returns:
            The run's id.

        Raises:
            JobTooLarge: the cluster can never hold it.
            StoreRefused: its checkpoints could not be written; nothing is left behind.
        """
        job = JobSpec.model_validate(spec)
        digest = spec_digest(job)
        with self._lock:
            same = self._same(RunStates(Path(runs_root)), job, digest)
        if same is None:
            # May take seconds: others are not kept waiting for it.
            refuse_unfit(job, self._cluster(), gpus=device_of(job) == "cuda")
            check_store(job)
        with self._lock:
            states = self._states(runs_root)
            same = self._same(states, job, digest)
            if same is not None:
                self._adopt(states, same, job)
                return same.run_id
            claims = RunClaims.of(job)
            made = states.create(
                job.name, lambda run_id, path: self._new(job, digest, run_id, path), claims
            )
            folder = RunFolder(Path(made.run_folder))
            try:
                text = resolved_yaml(job)
                folder.open(text)
                folder.append_event("submitted", f"submitted as {made.run_id}")
                if claims is not None:
                    claims.keep_spec(made.run_id, text)
            except PlatformError:
                # The caller hears of it; half a run would only stand in the way.
                folder.close()
                states.forget(made.run_id)
                if claims is not None:
                    claims.give_back(made.run_id)
                raise
            self._launch(made, job, states, folder)
            return made.run_id

    def _same(self, states: RunStates, job: JobSpec, digest: str) -> JobRecord | None:
        """The unfinished run of the very same job, if there is one."""
        for found in states.all():
            same = (found.job, found.spec_digest) == (job.name, digest)
            if same and not found.terminal and not self._over(states, found):
                return found
        return None

    def status(self, name: str) -> dict[str, Any]:
        """State of a run, by run id or by job name (its newest run)."""
        record, states = self._find(name)
        runner = self._runners.get(states.root / record.run_id)
        return runner.live.status() if runner is not None else record.to_status()

    def runs(self) -> list[dict[str, Any]]:
        """State of every run, oldest first."""
        found: list[dict[str, Any]] = []
        for root in self._roots:
            for record in RunStates(root).all():
                runner = self._runners.get(root / record.run_id)
                found.append(runner.live.status() if runner else record.to_status())
        return sorted(found, key=lambda status: float(status["submitted"]))

    def stop(self, name: str) -> str:
        """Ask a run to save and stop; returns its id at once."""
        with self._lock:
            record, states = self._find(name)
            if record.terminal:
                raise RunConflictError(f"{record.run_id} is {record.state} already")
            runner = self._runners.get(states.root / record.run_id)
            if runner is not None and runner.active:
                # First, because the disk may be full, and that is a good reason to stop a run.
                runner.request_stop()
            changed = states.update(record.run_id, _ask_to_stop)
            if (runner is None or not runner.active) and changed.abandoned():
                states.update(record.run_id, _stopped)
            return record.run_id

    def resume(self, name: str, older: bool = False) -> str:
        """Go on with a stopped or failed run, from its newest committed checkpoint.

        Args:
            name: a run's id, or a job's name.
            older: where that is damaged, set it aside and take an older one.
        """
        with self._lock:
            record, states = self._find(name)
            if record.state is RunState.SUCCEEDED:
                raise RunConflictError(f"{record.run_id} has succeeded; nothing is left to do")
            runner = self._runners.get(states.root / record.run_id)
            ended_here = runner is not None and not runner.active
            if not (record.terminal or ended_here or record.abandoned()):
                raise RunConflictError(f"{record.run_id} is {record.state}; it needs no resume")
            _check_store_of(record)
            if runner is not None:
                runner.join(RELEASE_SECONDS)
            states.update(record.run_id, partial(_fresh_start, older))
            self._launch_stored(states, record.run_id, "resumed")
            return record.run_id

    def events(self, name: str, after: int = 0) -> list[dict[str, Any]]:
        """Events of a run with a number above ``after``."""
        return self._folder(name).events(after)

    def metrics(self, name: str, after: int = 0) -> Page:
        """Metric records of a run from byte ``after`` on."""
        return self._folder(name).metrics(after)

    def logs(self, name: str, rank: int = 0, after: int = 0) -> Page:
        """Lines of a rank's log from byte ``after`` on."""
        return self._folder(name).log(rank, after)

    def shutdown(self) -> None:
        """End every gang; the runs stay as they are, for the next controller."""
        self._closing.set()
        with self._lock:
            runners = [runner for runner in self._runners.values() if runner.active]
        for runner in runners:
            runner.release()
        deadline = time.monotonic() + RELEASE_SECONDS
        for runner in runners:
            runner.join(max(0.0, deadline - time.monotonic()))

    # --- taking runs in hand ---

    def _new(self, job: JobSpec, digest: str, run_id: str, path: Path) -> JobRecord:
        return JobRecord(
            job=job.name,
            run_id=run_id,
            uid=uuid.uuid4().hex,
            reason="submitted",
            num_stages=len(job.stages),
            run_folder=str(path),
            submitted=time.time(),
            spec_digest=digest,
            priority=job.resources.priority,
            owner=this_owner(self._config.controller_id),
        )

    def _launch(
        self, record: JobRecord, spec: JobSpec, states: RunStates, folder: RunFolder
    ) -> None:
        live = LiveRun(record, spec, states, folder)
        runner = JobRunner(live, self._line, self._drains, self._config.runner)
        self._runners[states.root / record.run_id] = runner
        runner.start()

    def _launch_stored(
        self, states: RunStates, run_id: str, why: str, known: JobSpec | None = None
    ) -> None:
        """Claim a run that is in the store, and go on with it.

        Args:
            states: where it is.
            run_id: which one.
            why: for its log of events.
            known: its spec, if the caller has it.

        Raises:
            RunConflictError: another controller that may be alive owns it.
            PlatformError: its folder or its spec is unusable; with the spec the run has failed.
        """
        record = claim(states, run_id, self._config.controller_id)
        folder = RunFolder(Path(record.run_folder))
        folder.open(resolved_yaml(known) if known is not None else None)
        try:
            spec = load_job(folder.path / SPEC_FILE, check_files=False)
        except JobSpecError as error:
            problem = f"its spec cannot be read, submit it again: {error.problems[0]}"
            states.update(run_id, partial(_failed, problem))
            raise PlatformError(f"{run_id}: {problem}") from error
        record.workers, record.attempt = [], next_attempt(record)
        folder.append_event("submitted", f"{record.run_id} {why}")
        self._launch(record, spec, states, folder)

    def _adopt(self, states: RunStates, record: JobRecord, known: JobSpec | None = None) -> None:
        """Go on with an unfinished run, if nobody has it in hand."""
        # A run that has ended here may be unable to say so: a full disk. It is left to the user.
        if states.root / record.run_id not in self._runners and self._may_adopt(record):
            why = "continues where its last controller left"
            self._launch_stored(states, record.run_id, why, known)

    def _over(self, states: RunStates, record: JobRecord) -> bool:
        """Whether a run is over, or about to be, although its stored state does not say so."""
        runner = self._runners.get(states.root / record.run_id)
        if runner is not None and not runner.active and runner.live.record.terminal:
            # The disk was too full to hear of its end, and may not be now.
            runner.live.save()
            return True
        if record.stop_requested and record.abandoned():
            # Ended with Ctrl-C twice: going on with it would be to stop at once.
            states.update(record.run_id, _stopped)
        return record.stop_requested

    def _may_adopt(self, record: JobRecord) -> bool:
        mine = record.owner is not None and record.owner.controller == self._config.controller_id
        return not record.terminal and (mine or record.abandoned())

    def _take_up(self) -> None:
        """Adopt what is ours; and, unless this is a one-shot cluster, what is nobody's."""
        for root in self._roots:
            states = RunStates(root)
            for record in states.all():
                owner = record.owner
                mine = owner is not None and owner.controller == self._config.controller_id
                if not (mine or not self._config.runner.one_shot):
                    continue
                try:
                    with self._lock:
                        self._adopt(states, record)
                except Exception as error:
                    # One damaged run must not keep the others waiting; it is tried again and
                    # again, and said once.
                    if self._troubles.get(record.run_id) != str(error):
                        self._troubles[record.run_id] = str(error)
                        log.exception("cannot take up %s", record.run_id)

    def _adopt_forever(self) -> None:
        while not self._closing.wait(ADOPT_SECONDS):
            try:
                self._take_up()
            except Exception:
                log.exception("cannot look for unfinished runs")

    # --- finding runs ---

    def _find(self, name: str) -> tuple[JobRecord, RunStates]:
        problem: UnknownRunError | None = None
        found: list[tuple[JobRecord, RunStates]] = []
        for root in self._roots:
            states = RunStates(root)
            try:
                found.append((states.find(name), states))
            except UnknownRunError as error:
                problem = problem or error
        if not found:
            raise problem or UnknownRunError(f"no run or job {name!r}: nothing was submitted yet")
        return max(found, key=lambda pair: pair[0].submitted)

    def _folder(self, name: str) -> RunFolder:
        return RunFolder(Path(self._find(name)[0].run_folder))

    def _states(self, runs_root: str) -> RunStates:
        root = Path(runs_root)
        if root not in self._roots:
            self._roots.append(root)
            self._save_roots()
        return RunStates(root)

    @property
    def _roots_file(self) -> Path:
        return Path(self._config.runs_root) / f".controller-{self._config.controller_id}.json"

    def _load_roots(self) -> list[Path]:
        first = Path(self._config.runs_root)
        try:
            more = [Path(root) for root in json.loads(self._roots_file.read_text())]
        except (OSError, ValueError):
            more = []
        return [first, *(root for root in more if root != first)]

    def _save_roots(self) -> None:
        try:
            self._roots_file.parent.mkdir(parents=True, exist_ok=True)
            self._roots_file.write_text(json.dumps([str(root) for root in self._roots]))
        except OSError as error:
            raise PlatformError(f"cannot write {self._roots_file}: {error.strerror}") from error


def _check_store_of(record: JobRecord) -> None:
    """Refuse to go on with a run whose checkpoints could not be written."""
    try:
        spec = load_job(Path(record.run_folder) / SPEC_FILE, check_files=False)
    except JobSpecError:
        return  # said where the run is launched
    check_store(spec)


def _ask_to_stop(record: JobRecord) -> JobRecord:
    record.stop_requested = True
    return record


def _stopped(record: JobRecord) -> JobRecord:
    record.state, record.reason, record.owner = RunState.STOPPED, "stopped", None
    record.stop_requested, record.workers = False, []
    return record


def _failed(problem: str, record: JobRecord) -> JobRecord:
    record.state, record.reason, record.error = RunState.FAILED, problem, problem
    record.stop_requested, record.workers, record.owner = False, [], None
    return record


def _fresh_start(older: bool, record: JobRecord) -> JobRecord:
    record.state, record.reason, record.error = RunState.QUEUED, "resumed", None
    record.stop_requested, record.restarts, record.owner = False, 0, None
    record.take_older = older
    # Looked up again: the cache may have been cleared since.
    record.prepared = None
    return record
