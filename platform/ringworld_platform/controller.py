"""The controller: the one actor of a cluster that holds its jobs.

Detached and without CPUs of its own, it outlives the command that made it. Whatever it knows is in
the run folders, and which these are is in a list that outlives the cluster: killed and started
again by Ray, or made anew on the next cluster, it goes on with every run that was its own or is
nobody's, from the newest committed checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from ringworld_jobs.any_job import parse_job
from ringworld_jobs.resolve import spec_digest
from ringworld_platform.adoption import Adoption
from ringworld_platform.capacity import cluster
from ringworld_platform.drain import DrainWatch
from ringworld_platform.errors import RunConflictError, UnknownRunError
from ringworld_platform.fit import refuse_unfit
from ringworld_platform.heap import give_back
from ringworld_platform.intake import Intake, Submission
from ringworld_platform.job_queue import JobQueue
from ringworld_platform.job_runner import JobRunner
from ringworld_platform.live_run import LiveRun
from ringworld_platform.prewarmer import Prewarmer
from ringworld_platform.run_changes import ask_to_stop, fresh_start, stopped
from ringworld_platform.run_claims import check_store, spec_kept_in
from ringworld_platform.run_folder import Page, RunFolder
from ringworld_platform.run_records import read_spec
from ringworld_platform.run_state import JobRecord, RunState
from ringworld_platform.run_states import RunStates
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.runs_roots import RootList
from ringworld_platform.settling import settle_stored
from ringworld_platform.stage_setup import device_of
from ringworld_platform.telemetry import Telemetry
from ringworld_platform.tracking_service import TrackingService

log = logging.getLogger(__name__)

CONTROLLER_NAME = "ringworld-controller"
RELEASE_SECONDS = 30.0
ADOPT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What a controller is made with; Ray keeps it, and hands it to each restart.

    Attributes:
        controller_id: unlike for any two controllers, the same over restarts of one.
        runs_root: absolute folder of the runs that were submitted first.
        runner: how runs behave.
        roots_file: list of the folders of runs that outlives the cluster, for the controller of the
            next one; empty: this controller's own, in ``runs_root``.
    """

    controller_id: str
    runs_root: str
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    roots_file: str = ""


class Controller:
    """Takes jobs, runs them, and answers questions about them. Its methods run in threads."""

    def __init__(self, config: ControllerConfig) -> None:
        """Take up again what an earlier life of this controller, or a dead cluster, left."""
        logging.basicConfig(level=logging.INFO)
        self._config = config
        self._cluster = partial(cluster, fixed=config.runner.one_shot)
        self._line = JobQueue(self._cluster)
        self._drains = DrainWatch()
        self._tracking = TrackingService()
        self._adoption = Adoption(
            config.controller_id, self._runner, config.runner.store_lease_seconds
        )
        self._lock = self._adoption.lock
        self._intake = Intake(self._adoption)
        self._states = cache(RunStates)
        self._closing = threading.Event()
        self._roots = RootList(Path(config.roots_file or self._own_list()))
        with self._line.closed():
            self._take_up()
        self._prewarmer = Prewarmer(self._line, self._at_work)
        self._telemetry = Telemetry(lambda: list(self._adoption.runners.values()), self._line)
        self._telemetry.start()
        if not config.runner.one_shot:
            threading.Thread(target=self._adopt_forever, name="adopt", daemon=True).start()
            self._prewarmer.start()

    def submit(self, spec: dict[str, Any], runs_root: str, request: str = "") -> str:
        """Take a job; the same spec, while its run is unfinished, gives the same run.

        Args:
            spec: the resolved spec as JSON data, paths absolute.
            runs_root: absolute folder of its runs.
            request: this call, where it may be made again for want of an answer.

        Returns:
            The run's id.

        Raises:
            JobTooLarge: the cluster can never hold it.
            StoreRefused: its checkpoints could not be written; nothing is left behind.
            RunConflictError: another controller has a run of this very job in hand.
        """
        parsed = parse_job(spec)
        job = Submission(parsed, spec_digest(parsed), self._states(Path(runs_root)), request)
        with self._lock:
            same = self._intake.same(job)
        if same is None:
            # May take seconds: others are not kept waiting for it.
            refuse_unfit(parsed, self._cluster(), gpus=device_of(parsed) == "cuda")
            check_store(parsed)
        with self._lock:
            self._remember(runs_root)
            same = self._intake.same(job)
            if same is not None:
                return self._intake.join(job, same)
            return self._intake.join_elsewhere(job) or self._intake.make(job)

    def status(self, name: str) -> dict[str, Any]:
        """State of a run, by run id or by job name (its newest run)."""
        record, states = self._find(name)
        runner = self._adoption.runner_of(states, record.run_id)
        return runner.live.status() if runner is not None else record.to_status()

    def runs(self) -> list[dict[str, Any]]:
        """State of every run, oldest first."""
        # What the last list has left, which another thread made: one a thread would add up.
        give_back()
        found = [
            status
            for states in map(self._states, self._known_roots())
            for status in states.statuses(partial(self._adoption.status, states))
        ]
        return sorted(found, key=lambda status: float(status["submitted"]))

    def stop(self, name: str) -> str:
        """Ask a run to save and stop; returns its id at once."""
        with self._lock:
            record, states = self._find(name)
            if record.terminal:
                raise RunConflictError(f"{record.run_id} is {record.state} already")
            if record.moved_to:
                raise RunConflictError(f"{record.run_id} goes on elsewhere: {record.moved_to}")
            runner = self._adoption.runner_of(states, record.run_id)
            if runner is not None and runner.active:
                # First, because the disk may be full, and that is a good reason to stop a run.
                runner.request_stop()
            changed = states.update(record.run_id, ask_to_stop)
            if (runner is None or not runner.active) and changed.abandoned():
                states.update(record.run_id, stopped)
            return record.run_id

    def resume(self, name: str, older: bool = False, request: str = "", runs_root: str = "") -> str:
        """Go on with a stopped or failed run, from its newest committed checkpoint.

        Args:
            name: a run's id, a job's name, or the url of a run in its store on S3.
            older: where the newest checkpoint is damaged, set it aside and take an older one.
            request: this call, where it may be made again for want of an answer.
            runs_root: absolute folder of runs, where the run may be in one that is not known yet.
        """
        if runs_root:
            self._remember(runs_root)
        with self._lock:
            if "://" in name:
                name = self._adoption.bring(name, Path(runs_root)).run_id
            record, states = self._find(name)
            if request and record.request == request:
                return record.run_id  # this call has done it, and died before it could say so
            record = self._adoption.refreshed(states, record)
            if record.state is RunState.SUCCEEDED:
                if record.store is not None:
                    settle_stored(record)
                raise RunConflictError(f"{record.run_id} has succeeded; nothing is left to do")
            runner = self._adoption.runner_of(states, record.run_id)
            mine = self._adoption.is_mine(record)
            ended_here = runner is not None and not runner.active and mine
            if not (record.terminal or ended_here or record.abandoned() or record.moved_to):
                by = f" in the hands of {record.owner}" if record.owner else ""
                raise RunConflictError(f"{record.run_id} is {record.state}{by}; it needs no resume")
            spec = spec_kept_in(Path(record.run_folder))
            if spec is not None:
                check_store(spec)
            if runner is not None:
                runner.join(RELEASE_SECONDS)
            states.update(record.run_id, partial(fresh_start, older, request))
            self._adoption.go_on(states, record.run_id, "resumed")
            return record.run_id

    def events(self, name: str, after: int = 0) -> list[dict[str, Any]]:
        """Events of a run with a number above ``after``."""
        return self._folder(name).events(after)

    def metrics(self, name: str, after: int = 0) -> Page:
        """Metric records of a run from byte ``after`` on."""
        record, states = self._find(name)
        runner = self._adoption.runner_of(states, record.run_id)
        if runner is not None:
            runner.live.watch()
        return RunFolder(Path(record.run_folder)).metrics(after)

    def logs(self, name: str, rank: int = 0, after: int = 0) -> Page:
        """Lines of a rank's log from byte ``after`` on."""
        return self._folder(name).log(rank, after)

    def log_ends(self, name: str) -> dict[int, int]:
        """The ranks of a run that have a log, and the place behind its last line."""
        return self._folder(name).log_ends()

    def spec(self, name: str) -> dict[str, Any]:
        """A run's resolved spec as plain data; empty where it cannot be read."""
        return read_spec(self._folder(name).path)

    def shutdown(self) -> None:
        """End every gang; the runs stay as they are, for the next controller."""
        self._closing.set()
        with self._lock:
            runners = [runner for runner in self._adoption.runners.values() if runner.active]
        for runner in runners:
            runner.release()
        self._prewarmer.close()
        self._telemetry.close()
        deadline = time.monotonic() + RELEASE_SECONDS
        for runner in runners:
            runner.join(max(0.0, deadline - time.monotonic()))
        self._tracking.close()

    # --- finding runs ---

    def _at_work(self) -> list[LiveRun]:
        return [one.live for one in list(self._adoption.runners.values()) if one.active]

    def _runner(self, live: LiveRun) -> JobRunner:
        return JobRunner(live, self._line, self._drains, self._config.runner, self._tracking)

    def _take_up(self) -> None:
        """Adopt what is ours; and, unless this is a one-shot cluster, what is nobody's."""
        for states in map(self._states, self._known_roots()):
            for record in states.all(partial(self._adoption.at_work, states)):
                if self._adoption.is_mine(record) or not self._config.runner.one_shot:
                    self._adoption.take_up(states, record)

    def _adopt_forever(self) -> None:
        while not self._closing.wait(ADOPT_SECONDS):
            try:
                self._take_up()
            except Exception:
                log.exception("cannot look for unfinished runs")
            give_back()

    def _find(self, name: str) -> tuple[JobRecord, RunStates]:
        problem: UnknownRunError | None = None
        found: list[tuple[JobRecord, RunStates]] = []
        for states in map(self._states, self._known_roots()):
            try:
                found.append((states.find(name), states))
            except UnknownRunError as error:
                problem = problem or error
        if not found:
            raise problem or UnknownRunError(f"no run or job {name!r}: nothing was submitted yet")
        return max(found, key=lambda pair: pair[0].submitted)

    def _folder(self, name: str) -> RunFolder:
        return RunFolder(Path(self._find(name)[0].run_folder))

    def _known_roots(self) -> list[Path]:
        first = Path(self._config.runs_root)
        return [first, *(root for root in self._roots.all() if root != first)]

    def _remember(self, runs_root: str) -> None:
        if self._config.roots_file or Path(runs_root) != Path(self._config.runs_root):
            self._roots.add(Path(runs_root))

    def _own_list(self) -> str:
        return f"{self._config.runs_root}/.controllers/{self._config.controller_id}.json"
