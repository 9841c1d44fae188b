"""What a parity check computes: the job's model, its own rows, and the stage's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from ringworld_jobs.spec import JobSpec, MemorySpec, StageSpec
from ringworld_jobs.units import format_tokens
from ringworld_model.batch import TrainBatch
from ringworld_model.config import ModelConfig
from ringworld_workers.parity.rows import (
    JobData,
    as_one_document,
    first_rows,
    require_targets,
    shortened,
)

Precision = Literal["bf16", "fp32", "fp64"]

DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
LONGEST_CONTEXT = 4096
"""Tokens of a row where the caller asks for no other cap: minutes, not hours, on a CPU."""


class RingShape(NamedTuple):
    """Ranks that share a sequence: places of the ring, and ranks that split the heads at each."""

    ring: int
    heads: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.ring * self.heads


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """What every rank computes; plain data that travels to the processes.

    Attributes:
        job: name of the job.
        stage: name of the stage.
        model_config: the job's model, with the layers to check.
        seed: of the weights.
        rope_theta: the stage's.
        layout: the stage's ``attention.layout``.
        backend: the kernel asked for.
        memory: the stage's levers; the one rank pulls none.
        loss_tile_tokens: the stage's.
        modality_weights: the stage's loss weights of text and vision.
        precision: dtype of weights and activations. A bf16 check looks at fp32 too, which sees far
            smaller defects.
        ring_sizes: rings to check, the smallest first.
        rows: whole rows by how they are packed: "packed" as the job does, "dense" as one document.
        stage_context_length: tokens of the stage's rows; those here may be shorter.
        notes: what was changed or cannot be seen here, one sentence each.
    """

    job: str
    stage: str
    model_config: ModelConfig
    seed: int
    rope_theta: float
    layout: str
    backend: str
    memory: MemorySpec
    loss_tile_tokens: int
    modality_weights: tuple[float, float]
    precision: Precision
    ring_sizes: tuple[RingShape, ...]
    rows: dict[str, TrainBatch]
    stage_context_length: int
    notes: tuple[str, ...]

    @property
    def context_length(self) -> int:
        """Tokens of a row."""
        return self.rows["packed"].tokens.shape[1]


def build_case(
    spec: JobSpec,
    data: JobData,
    *,
    stage_name: str | None = None,
    ring_sizes: Sequence[int | tuple[int, int]] = (1, 2, 4),
    num_layers: int = 2,
    num_rows: int = 1,
    precision: Precision = "fp32",
    context_length: int | None = None,
) -> ParityCase:
    """Take the job's model and its first rows of a stage, for a check on this machine's CPU.

    Args:
        spec: the job.
        data: its prepared data.
        stage_name: the stage; the last one where None, which has the longest rows.
        ring_sizes: rings to check: sizes, or (ring, heads) sizes.
        num_layers: layers of the model; those that it has, at most.
        num_rows: rows of the batch.
        precision: dtype of the check.
        context_length: tokens of a row at most; ``LONGEST_CONTEXT`` where None.

    Raises:
        ValueError: no such stage, or an impossible ring size.
        DataError: the data does not fit, or holds no target.
    """
    shapes = {RingShape(size) if isinstance(size, int) else RingShape(*size) for size in ring_sizes}
    if not shapes or min(min(shape) for shape in shapes) < 1:
        raise ValueError(f"ring_sizes={list(ring_sizes)}; give sizes of at least 1, such as 1,2,4")
    names = [stage.name for stage in spec.stages]
    if stage_name is not None and stage_name not in names:
        raise ValueError(f"stage {stage_name!r} is unknown; the job has {', '.join(names)}")
    stage = spec.stages[-1 if stage_name is None else names.index(stage_name)]
    notes: list[str] = []
    if stage.attention.backend not in ("auto", "cpu", "reference"):
        backend = stage.attention.backend
        notes.append(f"attention.backend={backend} needs a GPU; the check takes the CPU's kernel")
        attention = stage.attention.model_copy(update={"backend": "auto"})
        stage = stage.model_copy(update={"attention": attention})
    return case_of(
        spec,
        stage,
        data.model_config,
        first_rows(data, stage, spec.seed, num_rows),
        ring_sizes=tuple(sorted(shapes, key=lambda shape: (shape.size, shape))),
        num_layers=num_layers,
        precision=precision,
        context_length=LONGEST_CONTEXT if context_length is None else context_length,
        notes=notes,
    )


def case_of(
    spec: JobSpec,
    stage: StageSpec,
    config: ModelConfig,
    packed: TrainBatch,
    *,
    ring_sizes: tuple[RingShape, ...],
    num_layers: int,
    precision: Precision,
    context_length: int,
    notes: Sequence[str] = (),
) -> ParityCase:
    """Cut a model and rows down to what a check computes.

    Args:
        spec: the job.
        stage: whose settings are used.
        config: the job's whole model.
        packed: rows of the stage, [R, S].
        ring_sizes: rings to check, the smallest first.
        num_layers: layers of the model; those that it has, at most.
        precision: dtype of the check.
        context_length: tokens of a row at most.
        notes: what the caller has changed.

    Raises:
        DataError: the rows hold no target.
    """
    told = list(notes)
    if num_layers < config.num_layers:
        told.append(f"the first {num_layers} of {config.num_layers} layers are checked")
        config = replace(config, num_layers=num_layers)
    if context_length < stage.context_length:
        packed = shortened(packed, context_length)
        told.append(
            f"rows are shortened from {format_tokens(stage.context_length)} to "
            f"{format_tokens(context_length)} tokens, each document in proportion"
        )
    require_targets(packed)
    if max(len(lengths) for lengths in packed.document_lengths) < 2:
        told.append("the packed rows hold one document each; more rows may show packing")
    return ParityCase(
        job=spec.name,
        stage=stage.name,
        model_config=config,
        seed=spec.seed,
        rope_theta=stage.rope_theta,
        layout=stage.attention.layout,
        backend=stage.attention.backend,
        memory=stage.memory,
        loss_tile_tokens=stage.loss.tile_tokens,
        modality_weights=(stage.loss.text, stage.loss.vision),
        precision=precision,
        ring_sizes=ring_sizes,
        rows={"packed": packed, "dense": as_one_document(packed)},
        stage_context_length=stage.context_length,
        notes=tuple(told),
    )
