"""When a stage saves, and from which checkpoint it starts."""

from __future__ import annotations

import base64
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ringworld_workers.checkpoint.layout import CheckpointRef, TrainState
from ringworld_workers.checkpoint.reader import CheckpointError, load, newest
from ringworld_workers.checkpoint.writer import CheckpointWriter
from ringworld_workers.engine.base import Engine
from ringworld_workers.learning_rate import learning_rate_at
from ringworld_workers.mesh import Mesh
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a stage begins: its first step to run, and the checkpoint that it comes from."""

    step: int
    tokens: int
    key: str | None
    bookmark: Any = None
    """Of the row plan, see ``StageLoader.open_at``."""


class StageCheckpoints:
    """Restores a stage, and saves it on the spec's schedule. All methods run on every rank.

    ``restore``, ``save`` and ``drain`` are collectives; ``due`` and
    ``uploading`` are local.
    """

    def __init__(self, job: StageJob, mesh: Mesh, engine: Engine) -> None:
        """Open the store; nothing is written yet."""
        self.job, self.mesh, self.engine = job, mesh, engine
        self.store = open_store(job.checkpoint_url)
        self.writer = CheckpointWriter(self.store, mesh, job)
        self.committed_key: str | None = None
        self._every = job.spec.checkpoint.every
        self._saved_step: int | None = None
        self._last_step = 0
        self._last_time = time.monotonic()
        self._steps_done = 0

    def restore(self) -> Start:
        """Load the newest committed checkpoint of this stage, else the end of the stage before.

        Raises:
            CheckpointError: the stage before left no final checkpoint, what is there is damaged, or
                it is of a later stage or another batch size.
        """
        ref = self._agree_on(newest(self.store) if self.mesh.rank == 0 else None)
        index = self.job.stage_index
        if ref is None and index == 0:
            return Start(step=0, tokens=0, key=None)
        if ref is None or ref.stage_index < index - 1:
            raise CheckpointError(
                f"stage {self.job.stage.name} starts from the end of stage "
                f"{self.job.spec.stages[index - 1].name}, but {self.store.url} holds no committed "
                "checkpoint of it"
            )
        if ref.stage_index > index:
            raise CheckpointError(
                f"{ref.key} is of a later stage than {self.job.stage.name}; continue with that "
                "stage, or start a new run"
            )
        same_stage = ref.stage_index == index
        inherits = self.job.stage.optimizer_state == "inherit"
        state = load(self.store, ref, self.engine, self.mesh, with_optimizer=same_stage or inherits)
        self.committed_key = ref.key
        if not same_stage:
            if not state.final:
                raise CheckpointError(
                    f"{ref.key} is not the end of its stage, so stage "
                    f"{self.job.stage.name} cannot start from it"
                )
            return Start(step=0, tokens=state.tokens, key=ref.key)
        expected = state.step * self.job.stage.rows_per_step
        if state.cursor != expected:
            raise CheckpointError(
                f"{ref.key} continues at row {state.cursor}, but with the stage's "
                f"{self.job.stage.rows_per_step} rows a step its step {state.step} would continue "
                f"at row {expected}; give global_batch_tokens and context_length their old values"
            )
        if state.rng:
            torch.set_rng_state(_decode_rng(state.rng))
        self._last_step = self._steps_done = self._saved_step = state.step
        return Start(state.step, state.tokens, ref.key, state.bookmark)

    def due(self) -> bool:
        """Whether the schedule asks for a checkpoint at this boundary."""
        seconds = time.monotonic() - self._last_time
        return self._every.due(self._steps_done - self._last_step, seconds)

    def note_step(self, step: int) -> None:
        """Take note that ``step`` steps of the stage are done."""
        self._steps_done = step

    def uploading(self) -> bool:
        """Whether this rank's part of a checkpoint is still on its way."""
        return self.writer.uploading()

    def drain(self) -> dict[str, Any] | None:
        """Commit the checkpoint in flight, if any; waits for its upload.

        Returns:
            What the writer says of it: see ``CheckpointWriter.commit``.
        """
        if not self.writer.in_flight:
            return None
        committed = self.writer.commit()
        self.committed_key = committed["key"]
        return committed

    def save(
        self,
        step: int,
        tokens: int,
        *,
        bookmark: Any = None,
        final: bool = False,
        metrics: dict[str, float] | None = None,
    ) -> dict[str, Any] | None:
        """Snapshot the state after ``step`` steps and start its upload.

        A stop right after a restore finds its state saved already, and saves nothing.

        Returns:
            What was committed on the way, if an earlier upload had to be finished first.
        """
        earlier = self.drain()
        if step == self._saved_step and not final:
            return earlier
        stage = self.job.stage
        state = TrainState(
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
        self.writer.snapshot(self.engine, state)
        self._saved_step = self._last_step = step
        self._last_time = time.monotonic()
        return earlier

    def close(self) -> None:
        """Wait for background threads; a checkpoint that is still in flight stays uncommitted."""
        self.writer.close()

    def _agree_on(self, ref: CheckpointRef | None) -> CheckpointRef | None:
        """Rank 0 looks; all ranks start from what it saw."""
        box = [ref]
        dist.broadcast_object_list(box, src=0, group=self.mesh.control_group)
        return box[0]


def _encode_rng(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode_rng(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
