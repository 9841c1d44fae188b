"""The durable state of every run: one small JSON object each, changed by compare-and-set.

Whoever may write (controllers, one at a time a run) reads, changes and puts back what it read; a
writer that comes second sees a conflict and starts over from what the first one wrote.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from ringworld_platform.errors import PlatformError, RunConflictError, UnknownRunError
from ringworld_platform.run_claims import RunClaims
from ringworld_platform.run_records import STATE_FILE
from ringworld_platform.seen_files import SeenFiles
from ringworld_workers.store.base import Conflict, StoreError
from ringworld_workers.store.opening import open_store

LEASE_SECONDS = 30.0
_MAX_RACES = 50
_HIDDEN = frozenset(
    {
        *("spec_digest", "stop_requested", "stages_done", "restarts", "prepared", "owner"),
        *("uid", "take_older", "rollbacks", "epoch", "fetched", "request", "moved_to"),
        *("evaluated", "missed"),
    }
)


class RunState(StrEnum):
    """Where a run stands."""

    QUEUED = "QUEUED"
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED})


class WorkerRow(BaseModel):
    """One rank, as ``status`` shows it."""

    rank: int
    pid: int
    node: str
    device: str
    phase: str = "start"
    step: int = 0
    slow: float | None = None
    """Its time to compute to that of the others, while that is held to be slow."""
    since: float | None = None
    """When it began its phase, seconds since the epoch by its own clock."""
    hop: int = 0
    """Hops of the ring that are behind it, of the round at hand."""
    awaits: int | None = None
    """The rank whose keys and values it waited for when it was last heard of."""
    memory_bytes: int | None = None
    """Of its device, or of its process where it computes on the CPU."""
    compute_seconds: float | None = None
    """What attention computed in its last step, waiting left out."""


class Owner(BaseModel):
    """The controller that has a run in hand: it is the only one that may run its gangs."""

    controller: str
    host: str
    pid: int
    beat: float
    """When it last said so, seconds since the epoch."""
    lease_seconds: float = LEASE_SECONDS
    """For how long after a beat the run is its own."""
    machine: str = ""
    """Where ``pid`` means something: hosts may share a name. Empty: only the name is known."""

    def alive(self, now: float) -> bool:
        """Whether it may still be at work: a fresh beat, and not known to be gone."""
        if now - self.beat > self.lease_seconds:
            return False
        here = self.host == socket.gethostname() and self.machine in ("", this_machine())
        return not here or self.pid == os.getpid() or _process_exists(self.pid)

    def __str__(self) -> str:
        """In words."""
        return f"process {self.pid} on {self.host}"


class JobRecord(BaseModel):
    """All that is known of one run, its spec aside."""

    model_config = ConfigDict(extra="ignore")

    job: str
    run_id: str
    state: RunState = RunState.QUEUED
    reason: str = ""
    """Why it is in this state, or what it is doing, in one line."""
    stage: str = ""
    stage_index: int = 0
    num_stages: int
    step: int = 0
    num_steps: int = 0
    global_step: int = 0
    attempt: int = 0
    """Gangs are built again after failures, stops and lost controllers: each time is an attempt."""
    context_length: int = 0
    ring_size: int = 0
    heads_size: int = 1
    data_parallel_size: int = 0
    checkpoint: str | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    stall_limit_seconds: float | None = None
    """So long without progress of any rank ends the gang; None while there is no gang."""
    error: str | None = None
    tracking_problem: str | None = None
    """Why MLflow has not everything yet, in one line."""
    run_folder: str
    workers: list[WorkerRow] = []
    submitted: float = 0.0
    updated: float = 0.0

    spec_digest: str
    uid: str = ""
    """Unlike for any two runs, also of the same id; empty in records that had none."""
    priority: int = 0
    place: int | None = None
    """Place in the line of runs that want workers, from 1; None for a run that is not in it."""
    start_seconds: float | None = None
    """Estimate of how long it will still wait there, if that is known."""
    waiting_since: float | None = None
    """Since when it waits, seconds since the epoch."""
    stages_done: int = 0
    """Stages that are finished; the next one to run has this index."""
    evaluated: int = 0
    """Stages whose evaluations are done, those counted that have none."""
    missed: str = ""
    """Limits that an evaluation has missed and that end the job; a resume takes them back."""
    stop_requested: bool = False
    restarts: int = 0
    """Restarts since the last newly committed checkpoint."""
    left_out: dict[int, list[int]] = {}
    """By stage index, the steps (counted from 1) whose rows are left out: training diverged."""
    rollbacks: int = 0
    """Of the stage at hand, because training diverged."""
    take_older: bool = False
    """Until a checkpoint is committed: start from an older one where the newest is damaged."""
    prepared: dict[str, Any] | None = None
    """What the data recipe's build returned."""
    owner: Owner | None = None
    store: str | None = None
    """Where this record and the run's logs are kept besides its folder; None: in that alone."""
    epoch: int = 0
    """How often a controller has taken the run, counted in its store."""
    fetched: bool = False
    """It came from the store as somebody else wrote it there, and that may have changed since."""
    moved_to: str | None = None
    """That and by whom it was taken over elsewhere; its folder here is as old as that."""
    request: str = ""
    """The call that submitted or resumed it: made again, it changes nothing."""

    def trains(self, num_stages: int) -> bool:
        """Whether the part at hand trains a stage, and does not evaluate one that is trained.

        Args:
            num_stages: of the job.
        """
        return self.stages_done <= self.stage_index < num_stages

    @property
    def terminal(self) -> bool:
        """Whether the run has ended."""
        return self.state in TERMINAL

    def abandoned(self, now: float | None = None) -> bool:
        """Whether the run is unfinished and no controller has it in hand."""
        moment = time.time() if now is None else now
        held = self.owner is not None and self.owner.alive(moment)
        return not (self.terminal or held or self.moved_to)

    def to_status(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        status = self.model_dump(mode="json", exclude=set(_HIDDEN))
        if self.waiting_since is not None and not self.terminal:
            minutes = int(time.time() - self.waiting_since) // 60
            if minutes:
                status["reason"] += f"; waiting {minutes} min"
        if self.abandoned():
            name = self.store or self.run_id
            status["reason"] = (
                f"no controller runs it any more; `ringworld resume {name}` continues it"
            )
        elif self.moved_to and not self.terminal:
            status["reason"] = (
                f"goes on elsewhere: {self.moved_to}; "
                f"`ringworld status {self.store}` asks its store"
            )
        return status


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as it stands in its folder, and the etag of that."""

    record: JobRecord
    etag: str


class _Seen:
    """A run as its folder said; nobody changes the record."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self._status: dict[str, Any] | None = None

    def status(self) -> dict[str, Any]:
        """As ``JobRecord.to_status``, made once for a run that has ended: most have."""
        if not self.record.terminal:
            return self.record.to_status()
        if self._status is None:
            self._status = self.record.to_status()
        return dict(self._status)


class RunStates:
    """The runs of one folder. It remembers what ``all`` has read: keep it, to ask often."""

    def __init__(self, root: Path) -> None:
        """Take the folder of runs; it need not exist yet.

        Args:
            root: absolute path; each run has a folder in it.
        """
        self.root = root
        self._store = open_store(f"file://{root}")
        self._seen = SeenFiles[_Seen]()

    def create(
        self,
        job: str,
        record: Callable[[str, Path], JobRecord],
        claims: RunClaims | None = None,
    ) -> JobRecord:
        """Store a new run under the next free id: ``job-1``, ``job-2``, ...

        Args:
            job: name of the job.
            record: makes the record from the run id and the run's folder.
            claims: where the id must be free too, and is taken.
        """
        number = len([found for found in self.all() if found.job == job])
        if claims is not None:
            number = max(number, claims.highest(job))
        for _ in range(_MAX_RACES):
            number += 1
            run_id = f"{job}-{number}"
            if (self.root / run_id / STATE_FILE).exists():
                continue
            made = record(run_id, self.root / run_id)
            if claims is not None and not claims.take(made):
                continue
            try:
                with _plain_errors():
                    if self._store.put_if_absent(f"{run_id}/{STATE_FILE}", _encode(made)):
                        return made
            except PlatformError:
                if claims is not None:
                    claims.give_back(run_id)
                raise
            if claims is not None:
                claims.give_back(run_id)
        raise PlatformError(f"no free run id for {job} in {self.root} after {number} tries")

    def get(self, run_id: str) -> JobRecord:
        """The stored state of a run.

        Raises:
            UnknownRunError: there is none.
        """
        self._check_is_here(run_id)
        return self._read(run_id).record

    def update(self, run_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Change a run's state; ``change`` runs again if somebody else was faster.

        Args:
            run_id: which run.
            change: gives the new record from the stored one; it may raise to leave it as it is.

        Returns:
            The record as stored.
        """
        return self.renew(run_id, change, None).record

    def renew(
        self, run_id: str, change: Callable[[JobRecord], JobRecord], last: Stored | None
    ) -> Stored:
        """As ``update``, for who writes often: what it has put there last is not read again.

        Args:
            run_id: which run.
            change: as of ``update``; must leave the record as it is that it is given.
            last: what this gave the last time; another's change since is noticed all the same.
        """
        for _ in range(_MAX_RACES):
            self._check_is_here(run_id)
            stored = last or self._read(run_id)
            last = None
            changed = change(stored.record)
            changed.updated = time.time()
            try:
                with _plain_errors():
                    etag = self._store.put_if_match(
                        f"{run_id}/{STATE_FILE}", _encode(changed), stored.etag
                    )
            except Conflict:
                continue
            return Stored(changed, etag)
        raise RunConflictError(f"{run_id}: lost {_MAX_RACES} races to write its state; try again")

    def keep(self, record: JobRecord) -> JobRecord:
        """Put a run here that was made elsewhere; the one that is there of its id stays.

        Returns:
            What is there now.
        """
        with _plain_errors():
            self._store.put_if_absent(f"{record.run_id}/{STATE_FILE}", _encode(record))
        return self.get(record.run_id)

    def forget(self, run_id: str) -> None:
        """Remove a run that never came to be, folder and all."""
        with _plain_errors():
            self._store.delete_prefix(run_id)

    def all(self, without: Callable[[str], bool] = lambda run_id: False) -> list[JobRecord]:
        """Every run, oldest first; folders without a readable state are passed over.

        Args:
            without: whether a run of this id is left out, its folder unread.
        """
        # Copies, because the next one to ask is given the same.
        found = [seen.record.model_copy() for seen in self._scan(without)]
        return sorted(found, key=lambda record: (record.submitted, record.run_id))

    def statuses(
        self, known: Callable[[str], dict[str, Any] | None] = lambda run_id: None
    ) -> list[dict[str, Any]]:
        """What ``status --json`` prints of every run, oldest first.

        Args:
            known: gives it for the id of a run that the caller knows better than its folder does.
        """
        better: list[dict[str, Any]] = []

        def is_known(run_id: str) -> bool:
            status = known(run_id)
            if status is not None:
                better.append(status)
            return status is not None

        found = better + [seen.status() for seen in self._scan(is_known)]
        return sorted(found, key=lambda status: (status["submitted"], status["run_id"]))

    def find(self, name: str) -> JobRecord:
        """The run of that id, else the newest run of the job of that name.

        Raises:
            UnknownRunError: neither exists; the message names what does.
        """
        # Joined to the root, an absolute path would be taken for a run's id.
        if Path(name).name == name and (self.root / name / STATE_FILE).is_file():
            return self.get(name)
        records = self.all()
        runs = [record for record in records if record.job == name]
        if not runs:
            known = ", ".join(record.run_id for record in records[-5:]) or "none"
            raise UnknownRunError(f"no run or job {name!r} in {self.root}; the latest are: {known}")
        return runs[-1]

    def _scan(self, without: Callable[[str], bool]) -> list[_Seen]:
        # The folder, not the store's list: a run's folder holds thousands of objects.
        found = []
        for run_id in os.listdir(self.root) if self.root.is_dir() else ():
            if without(run_id):
                continue
            path, read = f"{self.root}/{run_id}/{STATE_FILE}", partial(self._see, run_id)
            with suppress(PlatformError, OSError):
                found.append(self._seen.get(path, read))
        return found

    def _see(self, run_id: str) -> _Seen:
        return _Seen(self.get(run_id))

    def _check_is_here(self, run_id: str) -> None:
        # Also before a write, which would make its folder anew.
        if not os.path.isfile(f"{self.root}/{run_id}/{STATE_FILE}"):
            raise UnknownRunError(f"no run {run_id!r} in {self.root}")

    def _read(self, run_id: str) -> Stored:
        with _plain_errors():
            data, etag = self._store.get_with_etag(f"{run_id}/{STATE_FILE}")
        try:
            return Stored(JobRecord.model_validate_json(data), etag)
        except ValidationError as error:
            raise PlatformError(
                f"{self.root / run_id / STATE_FILE} is not a run's state: {error}"
            ) from error


def next_attempt(record: JobRecord) -> int:
    """Number of the attempt that follows; a run whose first stage never began has none yet."""
    return record.attempt + 1 if record.attempt else 0


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A store's refusal (a full disk, no permission) as an error that commands print as it is."""
    try:
        yield
    except Conflict:
        raise
    except StoreError as error:
        raise PlatformError(str(error)) from error


def _encode(record: JobRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()


@cache
def this_machine() -> str:
    """Unlike for any two systems, and any two spaces of process numbers on one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process_exists(pid: int) -> bool:
    """Whether it is alive: one that has ended may stay listed until its parent hears of it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
