"""What a step came to: its sums, its losses, and its line of the metric log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ringworld_model.batch import TEXT, VISION
from ringworld_model.ring import RingPlan
from ringworld_workers.data.loader import StageLoader
from ringworld_workers.mesh import Mesh
from ringworld_workers.metrics import memory_bytes, peak_flops, training_flops
from ringworld_workers.ring_figures import ring_record
from ringworld_workers.stage_job import StageJob


@dataclass(frozen=True)
class StepSums:
    """A step's sums by modality over the whole global batch; equal on every rank. [2] each."""

    nll: torch.Tensor
    correct: torch.Tensor
    num_targets: torch.Tensor
    grad_norm: float
    """Global, before clipping; rank 0's."""
    ring: torch.Tensor
    """[world_size, 3] by rank, see ``ring_figures``."""


def step_losses(
    sums: StepSums, weight: torch.Tensor, modality_shares: tuple[float, float]
) -> dict[str, float]:
    """Loss and accuracy by modality, and the mixed loss that the step descended on.

    Args:
        sums: of the step.
        weight: [2], its loss weights over the whole global batch.
        modality_shares: of text and vision in the loss.
    """
    found: dict[str, float] = {}
    total = shares = 0.0
    for modality, name in ((TEXT, "text"), (VISION, "vision")):
        if weight[modality] > 0:
            found[f"loss_{name}"] = float(sums.nll[modality] / weight[modality])
            found[f"accuracy_{name}"] = float(sums.correct[modality] / weight[modality])
            total += modality_shares[modality] * found[f"loss_{name}"]
            shares += modality_shares[modality]
    found["loss"] = total / shares if shares else 0.0
    return found


def step_figures(
    job: StageJob,
    loader: StageLoader,
    mesh: Mesh,
    step: int,
    sums: StepSums,
    *,
    plans: Sequence[RingPlan],
    phases: Mapping[str, float],
    seconds: float,
    checkpoint_stall_seconds: float,
) -> dict[str, Any]:
    """A step's line of the metric log, but for its losses.

    Rates leave out the stall for a checkpoint. Phases and memory are those of this rank.

    Args:
        job: the stage.
        loader: gives the step's rows.
        mesh: this rank's place.
        step: which step, counted from 0.
        sums: of the step.
        plans: of this rank's rows.
        phases: seconds of this rank by phase.
        seconds: of the whole step.
        checkpoint_stall_seconds: of these, spent on a checkpoint.
    """
    stage = job.stage
    working = seconds - checkpoint_stall_seconds
    lengths = loader.document_lengths(step)
    step_tokens = stage.rows_per_step * stage.context_length
    num_targets = [int(number) for number in sums.num_targets]
    flops = training_flops(job.model_config, lengths, num_targets) / working
    peak = peak_flops(mesh.device)
    rows = loader.row_range(step)
    return {
        "grad_norm": sums.grad_norm,
        "tokens_per_second": step_tokens / working,
        "step_seconds": seconds,
        **{f"{name}_seconds": value for name, value in phases.items()},
        "checkpoint_stall_seconds": checkpoint_stall_seconds,
        **ring_record(sums.ring),
        **memory_bytes(mesh.device),
        "padding_share": 1 - sum(map(sum, lengths)) / step_tokens,
        "plan_imbalance": max(plan.imbalance for plan in plans),
        "model_flops_per_second": flops,
        **({"mfu": flops / (peak * mesh.world_size)} if peak else {}),
        "rows": [rows.start, rows.stop],
        "sample_ids": loader.sample_ids(step),
    }
