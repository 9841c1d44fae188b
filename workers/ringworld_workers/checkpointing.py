"""When a stage saves, and what happens when it cannot."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ringworld_workers.boundary import Boundary
from ringworld_workers.checkpoint.fence import TakenOver
from ringworld_workers.checkpoint.layout import (
    CheckpointError,
    StateNotFinite,
    StoreAway,
    TrainState,
)
from ringworld_workers.checkpoint.writer import CheckpointWriter
from ringworld_workers.engine.base import Engine
from ringworld_workers.learning_rate import learning_rate_at
from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter
from ringworld_workers.restoring import Start, restore
from ringworld_workers.save_records import SaveRecords
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store
from ringworld_workers.store_wait import StoreWait

log = logging.getLogger(__name__)

# A reader of records that is gone ends this process; one that hangs must not hold up a checkpoint.
STORED_SECONDS = 5.0


class StageCheckpoints:
    """Restores a stage, and saves it on the spec's schedule. All methods run on every rank.

    ``restore``, ``at_boundary``, ``stop`` and ``save_last`` are collectives; ``due`` and
    ``pending`` are local. What becomes of a save is the same on every rank.
    """

    def __init__(self, job: StageJob, mesh: Mesh, engine: Engine, reporter: Reporter) -> None:
        """Open the store; nothing is written yet."""
        self.job, self.mesh, self.engine, self.reporter = job, mesh, engine, reporter
        self.store = open_store(job.checkpoint_url)
        self.writer = CheckpointWriter(self.store, mesh, job, beat=self._beat)
        self.committed_key: str | None = None
        self._wanted = job.spec.checkpoint
        self._records = SaveRecords(job, mesh, reporter)
        self._saved_step: int | None = None
        self._last_step = 0
        self._last_time = time.monotonic()
        self._steps_done = 0
        self._position = 0
        """Of the newest record of the steps that the newest snapshot holds."""
        self._away = False
        """Whether the newest failure was that of a store which may come back."""

    def __enter__(self) -> StageCheckpoints:
        """Nothing is read or written yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for background threads, but not after a failure: that must be told at once."""
        if kind is None:
            self.close()

    def restore(self) -> Start:
        """Become the gang that saves, and load what this stage begins with.

        The other way round, a gang that should be dead could commit what this one does not know.

        Raises:
            TakenOver: another gang writes this run.
            CheckpointError, StoreError: see ``restoring.restore``.
        """
        self.writer.open()
        start = restore(self.job, self.store, self.engine, self.mesh, self.reporter)
        self.committed_key = start.key
        if start.resumed:
            self._last_step = self._steps_done = self._saved_step = start.step
        slow = self.writer.prepare(self.engine)
        if slow is not None:
            self._records.tell("checkpoint", slow, warn=True)
        return start

    def due(self) -> bool:
        """Whether the schedule asks for a checkpoint at this boundary."""
        seconds = time.monotonic() - self._last_time
        return self._wanted.every.due(self._steps_done - self._last_step, seconds)

    def note_step(self, step: int) -> None:
        """Take note that ``step`` steps of the stage are done."""
        self._steps_done = step

    def pending(self) -> bool:
        """Whether this rank has still to do, or to wait for, part of the checkpoint in flight.

        Steps that are committed are never done again, so what they reported would be lost for
        good, if this worker or the reader died between the commit and the next reading.
        """
        return self.writer.uploading() or not self.reporter.stored(self._position)

    def at_boundary(
        self, agreed: Boundary, step: int, tokens: int, bookmark: Callable[[], Any]
    ) -> None:
        """Take the checkpoint in flight on; save if that is due, or a stop is asked for.

        Args:
            agreed: what the gang agreed on.
            step: steps of the stage that are done.
            tokens: that the job has consumed.
            bookmark: of the row plan at this step.

        Raises:
            TakenOver: another gang writes this run by now.
            CheckpointError: more saves in a row have failed than the spec allows.
        """
        if self.writer.in_flight and not agreed.uploads_pending:
            self._settle(self.writer.advance, may_fail=agreed.stop)
            if self._store_is_away() and not agreed.stop:
                self._save_patiently(self._state(step, tokens, bookmark()))
                return
        if not agreed.stop:
            if not agreed.checkpoint_due or step == 0:
                return
            if self.writer.in_flight and self._wanted.when_busy == "skip":
                # With only the manifest left, this one stays due: the next boundary may save it.
                if agreed.uploads_pending:
                    self._records.left_out(step)
                    self._begin_interval(step)
                return
        self.reporter.phase("checkpoint", step)
        self._finish(may_fail=agreed.stop)
        # A stop right after a restore, or a commit, finds its state saved already.
        if step == self._saved_step:
            return
        state = self._state(step, tokens, bookmark())
        if self._store_is_away() and not agreed.stop:
            self._save_patiently(state)
        else:
            self._snapshot(state)

    def stop(self, step: int) -> str | None:
        """Commit what a stop has saved; waits for it.

        Returns:
            If it could not be saved, what to tell the user: training has stopped all the same.

        Raises:
            TakenOver: another gang writes this run by now.
        """
        self._finish(may_fail=True)
        if self._saved_step == step:
            return None
        text = (
            f"stopped at step {step} of stage {self.job.stage.name}, but its state is not saved: "
            f"{self._records.first_cause}; a resume goes on from "
            f"{self.committed_key or 'the initial weights'}"
        )
        self._records.tell("checkpoint_failed", text, warn=True)
        return text

    def save_last(
        self, step: int, tokens: int, *, bookmark: Any, metrics: dict[str, float]
    ) -> bool:
        """Save the stage's end and commit it; waits for the store, also for one that is away.

        It is tried as often as saves may fail in a row: all that the stage has done hangs on it.

        Returns:
            Whether it is saved; if not, a stop was asked for while the store was away.

        Raises:
            TakenOver: another gang writes this run by now.
            CheckpointError: it could not be saved.
        """
        self._finish(may_fail=True)
        state = self._state(step, tokens, bookmark, final=True, metrics=metrics)
        return self._save_patiently(state)

    def _store_is_away(self) -> bool:
        """Whether so many saves have failed that training waits for the store to come back."""
        return self._away and self._records.num_failed_in_row > self._wanted.max_failures

    def _save_patiently(self, state: TrainState) -> bool:
        """Save a state and commit it; while the store is away, wait for it with the state here.

        Returns:
            Whether it is saved; if not, a stop was asked for while the store was away.

        Raises:
            TakenOver: another gang writes this run by now.
            CheckpointError: it could not be saved.
        """
        timeout = self.job.spec.recovery.store_timeout
        waiting = StoreWait(
            timeout, self.mesh, should_stop=self.reporter.should_stop, beat=self._beat
        )
        tries = 0
        while True:
            self._snapshot(state)
            self._finish(may_fail=True)
            if self._saved_step == state.step:
                return True
            tries += 1
            if self._away:
                if tries == 1:
                    self._records.tell(
                        "store_away",
                        f"step {state.step} of stage {self.job.stage.name} waits for its store "
                        f"up to {timeout:g} s (recovery.store_timeout), with its state in memory",
                        warn=True,
                    )
                answer = waiting.wait()
                if answer == "stop":
                    return False
                if answer == "again":
                    continue
            elif tries <= self._wanted.max_failures:
                continue
            last = "last checkpoint" if state.final else f"checkpoint of step {state.step}"
            raise CheckpointError(
                f"the {last} of stage {self.job.stage.name} could not be saved: "
                f"{self._records.first_cause}; {self._remedy()}"
            )

    def close(self) -> None:
        """Wait for background threads; a checkpoint that is still in flight stays uncommitted."""
        self.writer.close()

    def _finish(self, *, may_fail: bool) -> None:
        """Commit the checkpoint in flight, if any; waits for its upload, and for its records."""
        if not self.writer.in_flight:
            return
        deadline = time.monotonic() + STORED_SECONDS
        while not self.reporter.stored(self._position):
            if time.monotonic() > deadline:
                log.warning("nobody has read the records for %g s", STORED_SECONDS)
                break
            time.sleep(0.005)
        self._settle(self.writer.commit, may_fail=may_fail)

    def _settle(self, action: Callable[[], dict[str, Any] | None], *, may_fail: bool) -> None:
        """Take the checkpoint in flight on, and note what becomes of it."""
        try:
            outcome = action()
        except TakenOver:
            raise
        except StateNotFinite as error:
            error.step = self._saved_step or 0
            raise
        except CheckpointError as error:
            self._away = isinstance(error, StoreAway)
            self._records.failed(self._saved_step or 0, error)
            self._saved_step = None
            failed, limit = self._records.num_failed_in_row, self._wanted.max_failures
            if failed > limit and not may_fail and not self._away:
                raise CheckpointError(
                    f"{failed} checkpoints in a row could not be saved (checkpoint.max_failures is "
                    f"{limit}); the first: {self._records.first_cause}; {self._remedy()}"
                ) from error
            return
        if outcome is not None:
            self.committed_key = outcome["key"]
            self._records.committed(outcome)

    def _remedy(self) -> str:
        place = self.committed_key or "the initial weights"
        return f"once the store is well, resume the run: it goes on from {place}"

    def _snapshot(self, state: TrainState) -> None:
        self._position = self.reporter.position()
        self.writer.snapshot(self.engine, state)
        self._saved_step = state.step
        self._begin_interval(state.step)

    def _begin_interval(self, step: int) -> None:
        """The next checkpoint is due an interval from here."""
        self._last_step = step
        self._last_time = time.monotonic()

    def _state(
        self,
        step: int,
        tokens: int,
        bookmark: Any,
        *,
        final: bool = False,
        metrics: dict[str, float] | None = None,
    ) -> TrainState:
        stage = self.job.stage
        return TrainState(
            stage=stage.name,
            stage_index=self.job.stage_index,
            step=step,
            tokens=tokens,
            cursor=step * stage.rows_per_step,
            rng=_encode_rng(torch.get_rng_state()),
            learning_rate=learning_rate_at(stage.learning_rate, max(0, step - 1), stage.num_steps),
            spec_digest=self.job.spec_digest,
            metrics=dict(metrics or {}),
            final=final,
            bookmark=bookmark,
        )

    def _beat(self) -> None:
        self.reporter.phase("checkpoint", self._steps_done)


def _encode_rng(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")
