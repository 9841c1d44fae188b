"""The runs that a controller has in hand, and how it takes more: claimed, up to date, begun.

A run has one owner at a time. Its record in the run's folder says which, by compare-and-set; for a
run on S3 the record in its store decides, since other machines have other folders.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ringworld_jobs.any_job import Job, load_any_job
from ringworld_jobs.problem import JobSpecError
from ringworld_jobs.resolve import resolved_yaml
from ringworld_platform.errors import PlatformError, RunConflictError
from ringworld_platform.job_runner import JobRunner
from ringworld_platform.live_run import LiveRun, claim, this_owner
from ringworld_platform.run_changes import failed, freed, moved, stopped
from ringworld_platform.run_claims import on_s3, run_url
from ringworld_platform.run_copy import STORE_LEASE_SECONDS, RunCopy
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_records import SPEC_FILE
from ringworld_platform.run_state import JobRecord, Owner, next_attempt
from ringworld_platform.run_states import RunStates
from ringworld_platform.stored_run import StoredRun
from ringworld_workers.store.base import Store
from ringworld_workers.store.opening import open_store
from ringworld_workers.store.retry import HASTE

log = logging.getLogger(__name__)


class Adoption:
    """A controller's runs. ``lock`` is held by whoever takes one."""

    def __init__(
        self,
        controller_id: str,
        make_runner: Callable[[LiveRun], JobRunner],
        store_lease_seconds: float = STORE_LEASE_SECONDS,
    ) -> None:
        """There are no runs yet.

        Args:
            controller_id: unlike for any two controllers.
            make_runner: makes what runs a job; it is not started.
            store_lease_seconds: for how long a run on S3 is the controller's after each beat.
        """
        self._id, self._make_runner = controller_id, make_runner
        self._store_lease = store_lease_seconds
        self.lock = threading.RLock()
        self.runners: dict[tuple[Path, str], JobRunner] = {}
        self._troubles: dict[str, str] = {}
        # To connect to a store takes longer than to ask it.
        self._stores: dict[str, Store] = {}

    def owner(self) -> Owner:
        """This controller, as the owner that a run's folder names."""
        return this_owner(self._id)

    def is_mine(self, record: JobRecord) -> bool:
        """Whether the record names this controller, in this or an earlier life."""
        return record.owner is not None and record.owner.controller == self._id

    def runner_of(self, states: RunStates, run_id: str) -> JobRunner | None:
        """What runs it, or has run it, in this process."""
        return self.runners.get((states.root, run_id))

    def status(self, states: RunStates, run_id: str) -> dict[str, Any] | None:
        """What ``status --json`` prints of a run that is, or was, at work in this process."""
        runner = self.runner_of(states, run_id)
        return None if runner is None else runner.live.status()

    def at_work(self, states: RunStates, run_id: str) -> bool:
        """Whether a run is at work in this process."""
        runner = self.runner_of(states, run_id)
        return runner is not None and runner.active

    def over(self, states: RunStates, record: JobRecord) -> bool:
        """Whether a run is over, or about to be, although its stored state does not say so."""
        runner = self.runner_of(states, record.run_id)
        if runner is not None and not runner.active and runner.live.record.terminal:
            # The disk was too full to hear of its end, and may not be now.
            runner.live.save()
            return True
        if record.stop_requested and record.abandoned():
            # Ended with Ctrl-C twice: going on with it would be to stop at once.
            states.update(record.run_id, stopped)
        return record.stop_requested

    def take_up(self, states: RunStates, record: JobRecord) -> None:
        """Adopt a run, if nobody has it in hand; what stands in the way is said once."""
        try:
            with self.lock:
                self.adopt(states, record)
        except Exception as error:
            # One damaged run must not keep the others waiting; it is tried again and again.
            if self._troubles.get(record.run_id) != str(error):
                self._troubles[record.run_id] = str(error)
                log.exception("cannot take up %s", record.run_id)

    def adopt(self, states: RunStates, record: JobRecord, known: Job | None = None) -> None:
        """Go on with an unfinished run, if nobody has it in hand.

        Raises:
            RunConflictError: a controller elsewhere has it.
            PlatformError: its folder, its spec or its store is unusable.
        """
        may = not record.terminal and (self.is_mine(record) or record.abandoned())
        # A run that has ended here may be unable to say so: a full disk. It is left to the user.
        if may and self.runner_of(states, record.run_id) is None:
            self.go_on(states, record.run_id, "continues where its last controller left", known)

    def refreshed(self, states: RunStates, record: JobRecord) -> JobRecord:
        """A run's newest record: another machine may have gone on with a run on S3.

        Raises:
            PlatformError: the store does not answer, or the folder cannot be written.
        """
        runner = self.runner_of(states, record.run_id)
        if record.store is None or (runner is not None and runner.active):
            return record
        newest = self._stored(record.store).refreshed(record)
        if newest is record:
            return record
        return states.update(
            record.run_id, lambda found: newest if found.epoch <= newest.epoch else found
        )

    def bring(self, url: str, root: Path) -> JobRecord:
        """Have a run of a store in a folder of runs here, with its logs.

        Args:
            url: of the run.
            root: folder of runs.

        Raises:
            UnknownRunError: the store has no such run.
            RunConflictError: another run of that name is here.
            PlatformError: the store does not answer, or the folder cannot be written.
        """
        run, states = self._stored(url), RunStates(root)
        here = next((found for found in states.all() if found.run_id == run.run_id), None)
        if here is not None:
            return self.refreshed(states, here.model_copy(update={"store": run.url}))
        return states.keep(run.restore(root / run.run_id))

    def begin(
        self,
        record: JobRecord,
        spec: Job,
        states: RunStates,
        folder: RunFolder,
    ) -> None:
        """Run a job that this controller owns, as its folder says; take it in its store too.

        Raises:
            RunConflictError: a controller elsewhere has it.
            PlatformError: the store does not answer.
        """
        copy = None
        if on_s3(spec):
            run = self._stored(record.store or run_url(spec, record.run_id))
            taken, etag = run.take(record, this_owner(self._id, self._store_lease))
            # Its owner here renews another lease.
            here = {"owner": record.owner, "moved_to": None}
            record = states.update(
                record.run_id, lambda _: taken.model_copy(update=here, deep=True)
            )
            copy = RunCopy(run, taken, etag, folder.path)
            copy.start()
        runner = self._make_runner(LiveRun(record, spec, states, folder, copy))
        self.runners[states.root, record.run_id] = runner
        runner.start()

    def go_on(self, states: RunStates, run_id: str, why: str, known: Job | None = None) -> None:
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
        record = claim(states, run_id, self._id)
        folder = RunFolder(Path(record.run_folder))
        folder.open(resolved_yaml(known) if known is not None else None)
        try:
            spec = load_any_job(folder.path / SPEC_FILE, check_files=False)
        except JobSpecError as error:
            problem = f"its spec cannot be read, submit it again: {error.problems[0]}"
            states.update(run_id, partial(failed, problem))
            raise PlatformError(f"{run_id}: {problem}") from error
        try:
            attempt = next_attempt(record)
            if on_s3(spec):
                record, written = self._up_to_date(states, record, spec, folder)
                attempt = max(next_attempt(record), written + 1 if written else 0)
            if record.terminal:
                return  # it has ended elsewhere
            record.workers, record.attempt = [], attempt
            folder.append_event("submitted", f"{record.run_id} {why}")
            self.begin(record, spec, states, folder)
        except RunConflictError as conflict:
            states.update(run_id, partial(moved, str(conflict)))
            raise
        except PlatformError:
            states.update(run_id, freed)
            raise

    def _up_to_date(
        self, states: RunStates, record: JobRecord, spec: Job, folder: RunFolder
    ) -> tuple[JobRecord, int]:
        """A claimed run's newest record, and the last attempt that has written checkpoints."""
        run = self._stored(record.store or run_url(spec, record.run_id))
        newest = run.refreshed(record)
        if newest is not record:
            folder.close()
            folder.open()
            newest.owner = None if newest.terminal else record.owner
            states.update(record.run_id, lambda _: newest)
        return newest, run.last_attempt()

    def _stored(self, url: str) -> StoredRun:
        above = url.rstrip("/").rpartition("/")[0]
        if above not in self._stores:
            self._stores[above] = open_store(above, HASTE)
        return StoredRun(url, self._stores[above])
