"""From whole rows to what one rank computes: the ring's plan for them, and this rank's cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ringworld_jobs.spec import StageSpec
from ringworld_model.batch import VISION, TrainBatch, cut
from ringworld_model.ring import RingContext, RingPlan, choose_backend, plan_rows
from ringworld_workers.mesh import Mesh
from ringworld_workers.stage_job import StageJob


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as a rank computes it: its cut of the rows, and the ring's plan for them."""

    local: TrainBatch
    ring: RingContext
    weight: torch.Tensor
    """[2] float64 on the CPU: sum of the cut's loss weights, by target modality."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same with the rows' cut on ``device``."""
        return replace(self, local=self.local.to(device))


def choose_stage_backend(job: StageJob, mesh: Mesh) -> tuple[str, str]:
    """Return the attention backend of a stage on this rank's device, and why.

    Raises:
        ValueError: the backend asked for cannot run here, or none can; says the remedy.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.stage.precision]
    requested, head_dim = job.stage.attention.backend, job.model_config.head_dim
    return choose_backend(mesh.device.type, str(dtype), requested, head_dim)


def plan_stage_rows(
    document_lengths: Sequence[Sequence[int]], stage: StageSpec, mesh: Mesh, backend: str
) -> list[RingPlan]:
    """Plan rows of a stage, with the layout that suits the backend where it is auto.

    Args:
        document_lengths: of each row.
        stage: its attention settings.
        mesh: its ring.
        backend: what computes attention.
    """
    return plan_rows(
        document_lengths,
        context_length=stage.context_length,
        ring_size=mesh.ring_size,
        layout=stage.attention.layout,
        heads_size=mesh.heads_size,
        backend=backend,
    )


def prepare_micro_batch(
    rows: TrainBatch, stage: StageSpec, mesh: Mesh, backend: str | None = None
) -> MicroBatch:
    """Plan the ring for whole rows [B, S] and cut out this rank's tokens [B, T].

    Args:
        rows: on the CPU; S is the stage's context_length.
        stage: its attention settings.
        mesh: this rank's place.
        backend: what computes attention; the stage's where None.
    """
    return cut_micro_batch(rows, stage, mesh, backend).to(mesh.device)


def cut_micro_batch(
    rows: TrainBatch, stage: StageSpec, mesh: Mesh, backend: str | None = None
) -> MicroBatch:
    """See ``prepare_micro_batch``; the cut stays on the CPU, where any thread may make it."""
    backend = backend or stage.attention.backend
    plans = plan_stage_rows(rows.document_lengths, stage, mesh, backend)
    ring = RingContext(
        plans=plans,
        group=mesh.ring_group,
        heads_group=mesh.heads_group,
        backend=backend,
    )
    local = cut(rows, plans, mesh.sequence_parallel_rank)
    return MicroBatch(local, ring, weight_by_modality(local))


def weight_by_modality(batch: TrainBatch) -> torch.Tensor:
    """Sum of the loss weights by target modality, float64 [2]."""
    weights = batch.loss_weights.double()
    vision = batch.target_modality == VISION
    return torch.stack([weights[~vision].sum(), weights[vision].sum()])
