"""How a job becomes a run, once: the same job, while its run is unfinished, is that run.

Whoever submits looks first for an unfinished run of the same name and spec. Two that do so at the
same moment both find none and take ids one after the other; each then looks again, and the one of
the higher number withdraws. On S3 the ids of all machines are looked at.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ringworld_jobs.any_job import Job
from ringworld_jobs.resolve import resolved_yaml
from ringworld_platform.adoption import Adoption
from ringworld_platform.errors import PlatformError, RunConflictError
from ringworld_platform.run_claims import RunClaims, on_s3
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord, Owner
from ringworld_platform.run_states import RunStates
from ringworld_platform.stored_run import StoredRun, claimed_digest, plain_errors, runs_in

# Between taking an id in the store and the run's first record there.
_BEGINNING_SECONDS = 60.0
# Of a job's runs in a store: older ones have ended long since.
_LATEST_RUNS = 20


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that was handed in.

    Attributes:
        spec: the job.
        digest: of the spec.
        states: of the folder of its runs.
        request: the call that handed it in; made again, it means the same run.
    """

    spec: Job
    digest: str
    states: RunStates
    request: str = ""


class Intake:
    """Makes runs of jobs, for one controller."""

    def __init__(self, adoption: Adoption) -> None:
        """Take the controller's runs."""
        self._adoption = adoption

    def same(self, job: Submission) -> JobRecord | None:
        """The run here of the very same job that is unfinished, or that this very call has made."""
        return self._same(job, lambda found: True)

    def join(self, job: Submission, run: JobRecord) -> str:
        """Go on with that run, if nobody has it in hand; returns its id.

        Raises:
            RunConflictError: another controller has it in hand.
        """
        if run.terminal:
            return run.run_id
        if run.moved_to:
            run = self._adoption.refreshed(job.states, run)
        self._adoption.adopt(job.states, run, job.spec)
        now = job.states.get(run.run_id)
        if not (now.terminal or self._adoption.is_mine(now)):
            raise _in_other_hands(now.run_id, now.owner)
        return run.run_id

    def join_elsewhere(self, job: Submission) -> str | None:
        """The same for a run that another machine has made in the store; None: there is none."""
        if not on_s3(job.spec):
            return None
        twin = self._twin(job, lambda number: True)
        return None if twin is None else self._go_on_with(job, twin)

    def make(self, job: Submission) -> str:
        """Make a run of the job and begin it; returns its id.

        Raises:
            RunConflictError: another controller has made one at the same moment.
            PlatformError: folder or store cannot be written; nothing is left behind.
        """
        spec, states = job.spec, job.states
        claims = RunClaims.of(spec)
        made = states.create(spec.name, lambda run_id, path: self._new(job, run_id, path), claims)
        folder = RunFolder(Path(made.run_folder))

        def withdraw() -> None:
            # Half a run would only stand in the way.
            folder.close()
            states.forget(made.run_id)
            if claims is not None:
                claims.give_back(made.run_id)

        try:
            earlier = _number_below(made)
            same = self._same(job, lambda found: earlier(found.run_id))
            if same is not None:
                withdraw()
                return self.join(job, same)
            twin = self._twin(job, earlier) if claims is not None else None
            if twin is not None:
                withdraw()
                return self._go_on_with(job, twin)
            text = resolved_yaml(spec)
            folder.open(text)
            folder.append_event("submitted", f"submitted as {made.run_id}")
            if claims is not None:
                claims.keep_spec(made.run_id, text)
            self._adoption.begin(made, spec, states, folder)
        except PlatformError:
            if (states.root / made.run_id).exists():
                withdraw()  # the caller hears of it
            raise
        return made.run_id

    def _same(self, job: Submission, where: Callable[[JobRecord], bool]) -> JobRecord | None:
        for found in job.states.all():
            if (found.job, found.spec_digest) != (job.spec.name, job.digest) or not where(found):
                continue
            if job.request and found.request == job.request:
                return found
            if found.moved_to:
                found = self._adoption.refreshed(job.states, found)
            if not found.terminal and not self._adoption.over(job.states, found):
                return found
        return None

    def _twin(self, job: Submission, where: Callable[[str], bool]) -> StoredRun | None:
        """An unfinished run of the same job in the store, whoever has made it."""
        store = job.spec.checkpoint.store
        with plain_errors(store):
            for run in runs_in(store, job.spec.name, _LATEST_RUNS):
                if not where(run.run_id):
                    continue
                digest, created = claimed_digest(run)
                if digest != job.digest:
                    continue
                found = run.read()
                if found is None:
                    if time.time() - created < _BEGINNING_SECONDS:
                        return run
                elif not found[0].terminal and not found[0].stop_requested:
                    return run
        return None

    def _go_on_with(self, job: Submission, twin: StoredRun) -> str:
        with plain_errors(twin.url):
            found = twin.read()
        if found is None:
            raise RunConflictError(
                f"{twin.url}, a run of this very job, is being made by another controller; "
                f"`ringworld status {twin.url}` shows it"
            )
        record = found[0]
        if record.owner is not None and record.owner.alive(time.time()):
            raise _in_other_hands(twin.url, record.owner)
        return self.join(job, self._adoption.bring(twin.url, job.states.root))

    def _new(self, job: Submission, run_id: str, path: Path) -> JobRecord:
        return JobRecord(
            job=job.spec.name,
            run_id=run_id,
            uid=uuid.uuid4().hex,
            reason="submitted",
            num_stages=max(1, len(job.spec.stages)),
            run_folder=str(path),
            submitted=time.time(),
            spec_digest=job.digest,
            priority=job.spec.resources.priority,
            owner=self._adoption.owner(),
            request=job.request,
        )


def _number_below(made: JobRecord) -> Callable[[str], bool]:
    """Whether a run of the same job has a lower number."""
    mine = int(made.run_id.rpartition("-")[2])

    def below(run_id: str) -> bool:
        number = run_id.rpartition("-")[2]
        return number.isdigit() and int(number) < mine

    return below


def _in_other_hands(name: str, owner: Owner | None) -> RunConflictError:
    by = f"another controller ({owner})" if owner is not None else "another controller"
    return RunConflictError(
        f"{name}, a run of this very job, is run by {by}; `ringworld status {name}` shows it"
    )
