"""One run in a controller's hands: its state, its folder, and the two kept in step."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ringworld_jobs.any_job import Job
from ringworld_jobs.planner.predict import Prediction
from ringworld_jobs.spec import JobSpec
from ringworld_platform.errors import RunConflictError, RunFolderError
from ringworld_platform.predictions import EVENT, Predictions
from ringworld_platform.run_copy import RunCopy
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_records import Record
from ringworld_platform.run_state import (
    LEASE_SECONDS,
    JobRecord,
    Owner,
    RunState,
    WorkerRow,
    this_machine,
)
from ringworld_platform.run_states import RunStates, Stored
from ringworld_platform.tally import Tally
from ringworld_workers.actor import Identity
from ringworld_workers.recorder import Progress

SAVE_SECONDS = 1.0
BEAT_SECONDS = 5.0
# So long after its metrics were asked for, a run is taken for one that is watched.
WATCH_SECONDS = 10.0
# A store that answers at all does so within this, also where it has to be asked again.
CONFIRM_SECONDS = 12.0
# Shorter than any lease: nobody takes a run over while its end is sent.
CLOSE_SECONDS = 20.0
_SMOOTHING = 0.3


class OwnershipLost(RunConflictError):
    """Another controller has taken the run over: this one must let go of it."""


def this_owner(controller: str, lease_seconds: float = LEASE_SECONDS) -> Owner:
    """This process as a run's owner."""
    return Owner(
        controller=controller,
        host=socket.gethostname(),
        pid=os.getpid(),
        beat=time.time(),
        lease_seconds=lease_seconds,
        machine=this_machine(),
    )


def claim(states: RunStates, run_id: str, controller: str) -> JobRecord:
    """Make this controller the run's owner, as far as its folder knows.

    Raises:
        RunConflictError: another controller that may be alive owns it.
    """

    def take(record: JobRecord) -> JobRecord:
        owner = record.owner
        if owner is not None and owner.controller != controller and owner.alive(time.time()):
            raise RunConflictError(
                f"{run_id} is run by another controller ({owner}); stop it there first"
            )
        record.owner = this_owner(controller)
        return record

    return states.update(run_id, take)


class LiveRun:
    """State and logs of a run that this controller owns.

    One thread (the runner's) changes it; any thread may read ``status``.
    """

    def __init__(
        self,
        record: JobRecord,
        spec: Job,
        states: RunStates,
        folder: RunFolder,
        copy: RunCopy | None = None,
    ) -> None:
        """Take a claimed run.

        Args:
            record: as it was claimed.
            spec: of the job.
            states: of its folder.
            folder: its logs.
            copy: of state and logs in the run's store, where that is on S3.
        """
        self.record, self.spec, self.states, self.folder = record, spec, states, folder
        self._copy = copy
        self._lock = threading.RLock()
        self._stored: Stored | None = None
        self._saved_at = 0.0
        self._watched = -math.inf
        self._changed = False
        self._predictions = Predictions(spec) if isinstance(spec, JobSpec) else None
        self.tally = Tally(spec)
        """For whoever measures."""

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.record.run_id

    @property
    def predicted(self) -> Prediction | None:
        """What the planner expects of the stage at hand; None where it does not know."""
        return self._predictions.predicted if self._predictions is not None else None

    def status(self) -> dict[str, Any]:
        """What ``status --json`` prints, as of now."""
        with self._lock:
            return self.record.to_status()

    def watch(self) -> None:
        """Somebody has asked for the newest metrics, and is likely to do so again."""
        self._watched = time.monotonic()

    @property
    def watched(self) -> bool:
        """Whether somebody follows the metrics."""
        return time.monotonic() - self._watched < WATCH_SECONDS

    def event(self, kind: str, text: str, **more: Any) -> None:
        """Write a line of the event log, with where the run is."""
        self.tally.event(kind)
        record = self.record
        place = {"stage": record.stage, "step": record.step, "attempt": record.attempt}
        self.folder.append_event(kind, text, **{**(place if record.stage else {}), **more})

    def set_state(self, state: RunState, reason: str, **fields: Any) -> None:
        """Move to a state, log it and save it, if it differs from what stands there."""
        with self._lock:
            differs = (self.record.state, self.record.reason) != (state, reason)
            self._assign(state=state, reason=reason, **fields)
        if differs:
            self.event("state", f"{state}: {reason}" if reason else str(state), state=str(state))
            self.save()

    def set_fields(self, **fields: Any) -> None:
        """Change fields; they are saved with the next save."""
        with self._lock:
            self._assign(**fields)

    def show(self, **fields: Any) -> None:
        """Change fields that need no save of their own; the next beat's has them."""
        with self._lock:
            for name, value in fields.items():
                setattr(self.record, name, value)

    def touch(self, save_seconds: float = SAVE_SECONDS) -> None:
        """Save what has changed, and say now and then that we live.

        Args:
            save_seconds: least time between two saves.

        Raises:
            OwnershipLost: another controller has taken the run over.
        """
        if self._copy is not None:
            self._heed(self._copy)
        age = time.monotonic() - self._saved_at
        if age >= max(BEAT_SECONDS, save_seconds) or (self._changed and age >= save_seconds):
            self.save()

    def save(self) -> None:
        """Put the state into the folder, and tell the run's store.

        Raises:
            OwnershipLost: another controller has taken the run over.
        """
        self._save({})

    def _save(self, end: Mapping[str, Any]) -> None:
        """Put the state into the folder, with these fields of a run that ends."""

        def put(stored: JobRecord) -> JobRecord:
            mine, theirs = self.record.owner, stored.owner
            if mine is None or theirs is None or mine.controller != theirs.controller:
                raise OwnershipLost(f"{self.run_id} belongs to another controller now")
            with self._lock:
                # A stop may be asked for by writing the state alone.
                self.record.stop_requested |= stored.stop_requested and not self.record.terminal
                mine.beat = time.time()
                self._changed = False
                return self._copied().model_copy(update=end)

        self._stored = self.states.renew(self.run_id, put, self._stored)
        saved = self._stored.record
        self.record.updated = saved.updated
        self._saved_at = time.monotonic()
        if self._copy is not None:
            self._copy.tell(saved)

    def confirm(self) -> None:
        """After a gang's failure: make sure that the run is still ours to judge.

        Raises:
            OwnershipLost: another controller has taken the run over; that has ended the gang.
        """
        if self._copy is not None:
            self._copy.confirm(CONFIRM_SECONDS)
            self._heed(self._copy)

    def conclude(self, state: RunState, reason: str, error: str | None) -> None:
        """Reach a terminal state: in the run's store first, then in its folder.

        Whoever is told of the end may end this process.
        """
        text = f"{state}: {reason}" if reason else str(state)
        with suppress(RunFolderError):  # the store may have room where the disk has none
            self.event("state", text, state=str(state))
        end = {"state": state, "reason": reason, "error": error, "stop_requested": False}
        if self._copy is not None:
            with self._lock:
                last = self.record.model_copy(update=end, deep=True)
            if not self._copy.finish(last, CLOSE_SECONDS):
                self._heed(self._copy)
                self.event(
                    "store",
                    f"{last.store} lacks the end of this run: "
                    f"{self._copy.problem or f'it took more than {CLOSE_SECONDS:g} s'}; it is sent "
                    "when the store answers, or by `ringworld resume` from this machine",
                )
        # In the folder before in memory: whoever hears of the end may resume the run at once.
        self._save(end)
        self.show(**end)

    def release(self) -> None:
        """Let go of the run, so that any controller may go on with it."""

        def free(stored: JobRecord) -> JobRecord:
            mine = self.record.owner
            if mine is not None and stored.owner and stored.owner.controller == mine.controller:
                stored.owner = None
            return stored

        freed = self.states.update(self.run_id, free)
        if self._copy is not None:
            self._copy.finish(freed, CLOSE_SECONDS)

    def let_go(self) -> None:
        """Note in the folder that another controller has the run, if it has another folder."""
        taken_by = self._copy.taken_by if self._copy is not None else None
        if taken_by is None:
            return

        def moved(stored: JobRecord) -> JobRecord:
            mine = self.record.owner
            if mine is not None and stored.owner and stored.owner.controller == mine.controller:
                stored.owner, stored.workers = None, []
                stored.moved_to = f"{taken_by} has taken it over"
            return stored

        self.record = self.states.update(self.run_id, moved)
        self.event("moved", f"another controller has taken the run over: {taken_by}")

    def close(self) -> None:
        """Close the folder; what the store lacks of a run that has ended is still sent."""
        if self._copy is not None and not self.record.terminal:
            self._copy.abandon()
        self.folder.close()

    def _heed(self, copy: RunCopy) -> None:
        """Hear what the store says of the run.

        Raises:
            OwnershipLost: another controller has taken it over.
        """
        if copy.taken_by is not None:
            raise OwnershipLost(f"{self.run_id} was taken over by {copy.taken_by}")
        if copy.stop_requested and not self.record.stop_requested:
            self.set_fields(stop_requested=True)

    # --- what the gang says ---

    def gang_started(self, identities: Sequence[Identity], device: str) -> None:
        """A gang has its workers."""
        rows = [
            WorkerRow(rank=rank, pid=found.pid, node=found.ip, device=_device(device, found))
            for rank, found in enumerate(identities)
        ]
        self.set_fields(workers=rows)

    def gang_ended(self) -> None:
        """The gang is gone."""
        self.set_fields(
            workers=[], tokens_per_second=None, eta_seconds=None, stall_limit_seconds=None
        )

    def progress(self, rank: int, progress: Progress) -> None:
        """A rank's heartbeat."""
        with self._lock:
            if rank < len(self.record.workers):
                row = self.record.workers[rank]
                row.phase, row.step = progress.phase, progress.step
                row.since, row.hop, row.awaits = progress.since, progress.hop, progress.awaits
                row.memory_bytes = progress.memory_bytes
                self._changed = True

    def slow_ranks(self, ratios: Mapping[int, float]) -> None:
        """Show which ranks hold up the others, and how much longer they compute."""
        with self._lock:
            for row in self.record.workers:
                row.slow = ratios.get(row.rank)

    def computed(self, seconds: Sequence[float]) -> None:
        """Show how long each rank has computed in its last step."""
        with self._lock:
            for row, spent in zip(self.record.workers, seconds, strict=False):
                row.compute_seconds = spent

    def metrics(self, records: Sequence[Record]) -> None:
        """Log rank 0's records, then show them in the state."""
        self.folder.append_metrics(records)
        self.tally.hear(records)
        handlers: dict[str, Callable[[Record], None]] = {
            "step": self._step,
            "checkpoint": self._checkpoint,
            "stage_start": self._stage_start,
        }
        for record in records:
            handler = handlers.get(str(record.get("kind")))
            if handler is not None:
                handler(record)

    def _stage_start(self, record: Record) -> None:
        step = int(record.get("step", 0))
        origin = record.get("resumed_from")
        start = f"from {origin}" if origin else "from the initial weights"
        self.set_fields(step=step)
        self.event("stage", f"stage {record.get('stage')} starts at step {step}, {start}")
        nodes = [worker.node for worker in self.record.workers]
        if self._predictions is not None:
            self._predictions.begin(record, nodes, self.record.prepared)

    def _step(self, record: Record) -> None:
        step = int(record.get("step", 0))
        rate, loss = record.get("tokens_per_second"), record.get("loss")
        with self._lock:
            smooth = self.record.tokens_per_second
            if isinstance(rate, int | float):
                smooth = rate if smooth is None else smooth + _SMOOTHING * (rate - smooth)
            self._assign(
                step=step,
                global_step=int(record.get("global_step", step)),
                loss=loss if loss is not None and math.isfinite(loss) else None,  # JSON has no NaN
                tokens_per_second=smooth,
                eta_seconds=self._tokens_left(step) / smooth if smooth else None,
            )
        compared = self._predictions.step(record) if self._predictions is not None else None
        if compared is not None:
            self.event(EVENT, compared.text, **compared.fields)

    def _checkpoint(self, record: Record) -> None:
        key = str(record.get("key"))
        # Progress: the restart budget is full again.
        self.set_fields(checkpoint=key, restarts=0, take_older=False)
        size = record.get("bytes")
        about = f", {size / 2**20:.1f} MiB" if isinstance(size, int | float) else ""
        self.event("checkpoint", f"committed {key}{about}")
        self.save()
        if self._copy is not None:
            self._copy.tell(self.record.model_copy(deep=True), hurry=True)

    def _copied(self) -> JobRecord:
        """The record as it is now: only rows and owner change in place. A deep copy takes long."""
        rows = [row.model_copy() for row in self.record.workers]
        owner = self.record.owner.model_copy() if self.record.owner is not None else None
        return self.record.model_copy(update={"workers": rows, "owner": owner})

    def _tokens_left(self, step: int) -> int:
        index = self.record.stage_index
        left = [s.num_steps * s.rows_per_step * s.context_length for s in self.spec.stages[index:]]
        stage = self.spec.stages[index]
        return sum(left) - step * stage.rows_per_step * stage.context_length

    def _assign(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self.record, name, value)
        self._changed = True


def _device(device: str, identity: Identity) -> str:
    return f"cuda:{identity.gpus[0]}" if device == "cuda" and identity.gpus else device
