"""The loss of a whole row: one forward pass over the ring, every position at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ringworld_model.batch import TrainBatch, cut
from ringworld_model.loss import POSITION_BUCKETS
from ringworld_model.mlp import SwiGLU
from ringworld_model.ring import RingContext, choose_backend, plan_rows
from ringworld_workers.evaluate.task import EvaluationRing

MODALITIES = 2
MLP_TILE_TOKENS = 8192
"""Tokens of a rank above which its feed-forward layers work in tiles: their inner tensors would
take several times the memory of all else."""


@dataclass(frozen=True)
class RowLoss:
    """Sums over the targets of one row, index 0 text, 1 vision.

    Attributes:
        nll: sum of weight * negative log-likelihood, nats.
        weight: sum of the loss weights.
        correct: sum of the weights of targets that the model ranks first.
        by_position: of each modality, nll and weight by bucket of positions; see
            ``ringworld_model.loss.bucket_edges``.
    """

    nll: list[float]
    weight: list[float]
    correct: list[float]
    by_position: list[list[list[float]]]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "nll": self.nll,
            "weight": self.weight,
            "correct": self.correct,
            "by_position": self.by_position,
        }


def score_row(ring: EvaluationRing, row: TrainBatch) -> RowLoss:
    """Score one whole row. A collective of the ring: all its ranks give the same row.

    Args:
        ring: with the model; each rank computes its share of the tokens.
        row: tensors [1, S] on the CPU; attention stays within its documents.
    """
    model = ring.loaded.model
    weight = model.text_embed.weight
    head_dim = model.config.head_dim
    backend, _ = choose_backend(ring.device.type, str(weight.dtype), "auto", head_dim)
    plans = plan_rows(
        row.document_lengths,
        context_length=row.tokens.shape[1],
        ring_size=ring.size,
        backend=backend,
    )
    local = cut(row, plans, ring.rank).to(ring.device)
    tile = MLP_TILE_TOKENS if local.tokens.shape[1] > MLP_TILE_TOKENS else None
    for part in model.modules():
        if isinstance(part, SwiGLU):
            part.tile_tokens = tile
    with torch.no_grad():
        sums = model(local, RingContext(plans=plans, group=ring.group, backend=backend))
    parts = (sums.nll, sums.weight, sums.correct, sums.by_position)
    flat = torch.cat([part.detach().double().flatten() for part in parts])
    if ring.group is not None:
        dist.all_reduce(flat, group=ring.group)
    nll, weights, correct = flat[: 3 * MODALITIES].view(3, MODALITIES).tolist()
    by_position = flat[3 * MODALITIES :].view(MODALITIES, POSITION_BUCKETS, 2).tolist()
    return RowLoss(nll, weights, correct, by_position)
