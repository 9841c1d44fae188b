"""When a stage saves."""

from __future__ import annotations

import base64
import logging
import time
from typing import Any

import torch

from ringworld_workers.checkpoint.layout import TrainState
from ringworld_workers.checkpoint.writer import CheckpointWriter
from ringworld_workers.engine.base import Engine
from ringworld_workers.learning_rate import learning_rate_at
from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter
from ringworld_workers.restoring import Start, restore
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store

log = logging.getLogger(__name__)


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

    def restore(self, reporter: Reporter, *, has_weights: bool) -> Start:
        """Load what this stage begins with: see ``restoring.restore``."""
        start = restore(
            self.job, self.store, self.engine, self.mesh, reporter, has_weights=has_weights
        )
        self.committed_key = start.key
        if start.resumed:
            self._last_step = self._steps_done = self._saved_step = start.step
        return start

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


def _encode_rng(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")
