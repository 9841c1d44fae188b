"""What is known of every run: its durable state, a small JSON object, and who holds it."""

from __future__ import annotations

import os
import socket
import time
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

LEASE_SECONDS = 30.0
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
        """What ``status --json`` prints; ``left``: unfinished, and nobody goes on with it here."""
        status = self.model_dump(mode="json", exclude=set(_HIDDEN))
        abandoned, moved = self.abandoned(), bool(self.moved_to and not self.terminal)
        status["left"] = abandoned or moved
        if self.waiting_since is not None and not self.terminal:
            minutes = int(time.time() - self.waiting_since) // 60
            if minutes:
                status["reason"] += f"; waiting {minutes} min"
        if abandoned:
            name = self.store or self.run_id
            status["reason"] = (
                f"no controller runs it any more; `ringworld resume {name}` continues it"
            )
        elif moved:
            status["reason"] = (
                f"goes on elsewhere: {self.moved_to}; "
                f"`ringworld status {self.store}` asks its store"
            )
        return status


def next_attempt(record: JobRecord) -> int:
    """Number of the attempt that follows; a run whose first stage never began has none yet."""
    return record.attempt + 1 if record.attempt else 0


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
