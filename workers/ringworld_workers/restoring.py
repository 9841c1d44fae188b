"""From which checkpoint a stage starts."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ringworld_workers.checkpoint.layout import CheckpointRef
from ringworld_workers.checkpoint.reader import CheckpointError, load, newest
from ringworld_workers.engine.base import Engine
from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.base import Store


@dataclass(frozen=True)
class Start:
    """Where a stage begins: its first step to run, and the checkpoint that it comes from."""

    step: int
    tokens: int
    key: str | None
    bookmark: Any = None
    """Of the row plan, see ``StageLoader.open_at``."""
    resumed: bool = False
    """Whether the checkpoint is of this stage, rather than the end of the one before."""


def restore(job: StageJob, store: Store, engine: Engine, mesh: Mesh, reporter: Reporter) -> Start:
    """Load the newest committed checkpoint of this stage, else the end of the stage before.

    A collective of the gang.

    Raises:
        CheckpointError: the stage before left no final checkpoint, what is there is damaged, or
            it is of a later stage or another batch size.
    """
    ref = _agree_on(newest(store) if mesh.rank == 0 else None, mesh)
    index = job.stage_index
    if ref is None and index == 0:
        return Start(step=0, tokens=0, key=None)
    if ref is None or ref.stage_index < index - 1:
        raise CheckpointError(
            f"stage {job.stage.name} starts from the end of stage "
            f"{job.spec.stages[index - 1].name}, but {store.url} holds no committed "
            "checkpoint of it"
        )
    if ref.stage_index > index:
        raise CheckpointError(
            f"{ref.key} is of a later stage than {job.stage.name}; continue with that "
            "stage, or start a new run"
        )
    same_stage = ref.stage_index == index
    inherits = job.stage.optimizer_state == "inherit"
    state = load(store, ref, engine, mesh, with_optimizer=same_stage or inherits)
    if not same_stage:
        if not state.final:
            raise CheckpointError(
                f"{ref.key} is not the end of its stage, so stage "
                f"{job.stage.name} cannot start from it"
            )
        return Start(step=0, tokens=state.tokens, key=ref.key)
    expected = state.step * job.stage.rows_per_step
    if state.cursor != expected:
        raise CheckpointError(
            f"{ref.key} continues at row {state.cursor}, but with the stage's "
            f"{job.stage.rows_per_step} rows a step its step {state.step} would continue "
            f"at row {expected}; give global_batch_tokens and context_length their old values"
        )
    if state.rng:
        torch.set_rng_state(_decode_rng(state.rng))
    return Start(state.step, state.tokens, ref.key, state.bookmark, resumed=True)


def _agree_on(ref: CheckpointRef | None, mesh: Mesh) -> CheckpointRef | None:
    """Rank 0 looks; all ranks start from what it saw."""
    box = [ref]
    dist.broadcast_object_list(box, src=0, group=mesh.control_group)
    return box[0]


def _decode_rng(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
