"""From whole rows to what one rank computes: the ring's plan for them, and this rank's cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ringworld_jobs.spec import StageSpec
from ringworld_model.batch import VISION, TrainBatch, cut
from ringworld_model.ring import RingContext, plan_rows
from ringworld_workers.mesh import Mesh


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as a rank computes it: its cut of the rows, and the ring's plan for them."""

    local: TrainBatch
    ring: RingContext
    weight: torch.Tensor
    """[2] float64 on the CPU: sum of the cut's loss weights, by target modality."""


def prepare_micro_batch(rows: TrainBatch, stage: StageSpec, mesh: Mesh) -> MicroBatch:
    """Plan the ring for whole rows [B, S] and cut out this rank's tokens [B, T].

    Args:
        rows: on the CPU; S is the stage's context_length.
        stage: its attention settings.
        mesh: this rank's place.
    """
    plans = plan_rows(
        rows.document_lengths,
        context_length=stage.context_length,
        ring_size=mesh.sequence_parallel_size,
        layout=stage.attention.layout,
    )
    ring = RingContext(
        plans=plans,
        group=mesh.sequence_parallel_group,
        backend=stage.attention.backend,
    )
    local = cut(rows, plans, mesh.sequence_parallel_rank)
    return MicroBatch(local.to(mesh.device), ring, weight_by_modality(local))


def weight_by_modality(batch: TrainBatch) -> torch.Tensor:
    """Sum of the loss weights by target modality, float64 [2]."""
    weights = batch.loss_weights.double()
    vision = batch.target_modality == VISION
    return torch.stack([weights[~vision].sum(), weights[vision].sum()])
