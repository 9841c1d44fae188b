"""What the ranks of a gang agree on between two steps, in one small all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ringworld_workers.micro_batch import MicroBatch


@dataclass(frozen=True)
class Boundary:
    """What the gang agreed on between two steps; equal on every rank."""

    weight: torch.Tensor
    """[2] float64: the step's loss weights over the whole global batch, by modality."""
    stop: bool
    checkpoint_due: bool
    uploads_pending: bool
    """A rank's upload, or the log's copy of what the checkpoint's steps have reported."""


def agree(
    batches: Sequence[MicroBatch],
    group: dist.ProcessGroup | None,
    *,
    stop: bool,
    checkpoint_due: bool,
    uploads_pending: bool,
) -> Boundary:
    """One small all-reduce before each step; what one rank says holds for all.

    The global loss weights must be known before the first backward of the step, because each rank
    scales its own sum by them.

    Args:
        batches: this rank's share of the step.
        group: all ranks of the gang, on the CPU.
        stop: this rank was asked to stop.
        checkpoint_due: one is due.
        uploads_pending: see ``Boundary``.
    """
    vector = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        vector[:2] += batch.weight
    vector[2:] = torch.tensor([stop, checkpoint_due, uploads_pending], dtype=torch.float64)
    dist.all_reduce(vector, group=group)
    return Boundary(
        weight=vector[:2].clone(),
        stop=bool(vector[2] > 0),
        checkpoint_due=bool(vector[3] > 0),
        uploads_pending=bool(vector[4] > 0),
    )
