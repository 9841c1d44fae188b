"""TrainBatch: every tensor of one packed batch, and how a ring cuts it into shares and back.

Legend: B rows, S = context_length tokens of a whole row, T tokens that one rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ringworld_model.ring import RingPlan

TEXT = 0
"""Modality of text tokens: text table, text head."""
VISION = 1
"""Modality of vision tokens: vision table, vision head."""
NUM_MODALITIES = 2

TENSOR_FIELDS = (
    "tokens",
    "targets",
    "modality",
    "target_modality",
    "segment_ids",
    "position_ids",
    "loss_weights",
)


@dataclass
class TrainBatch:
    """Packed rows, whole ([B, S]) or one rank's share of them ([B, T]).

    Text ids and vision ids are separate id spaces: the modality says which table an id is of.

    Attributes:
        tokens: int64, ids in the space of ``modality``.
        targets: int64, the id that each position predicts, in the space of ``target_modality``.
        modality: uint8, 0 text, 1 vision.
        target_modality: uint8, picks the head; it differs from ``modality`` where a clip begins.
        segment_ids: int32, 1.. in row order; 0 is padding. A token attends its own segment only.
        position_ids: int32, RoPE positions; restart at 0 in each segment.
        loss_weights: float32; 0 means no loss.
        document_lengths: per row, tokens of each segment in order, padding not included. Always of
            the whole row, so that every rank can derive the same ring plan from its share.
    """

    tokens: Tensor
    targets: Tensor
    modality: Tensor
    target_modality: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    loss_weights: Tensor
    document_lengths: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device | str) -> TrainBatch:
        """The same batch with every tensor on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in TENSOR_FIELDS}
        return replace(self, **moved)


def cut(batch: TrainBatch, plans: Sequence[RingPlan], rank: int) -> TrainBatch:
    """The share of ``batch`` that one rank of a ring holds.

    Args:
        batch: whole rows, tensors [B, S].
        plans: one plan a row, over the same ring and of equal local_length.
        rank: rank inside the ring, 0 .. ring_size * heads_size - 1.

    Returns:
        Tensors [B, T] with T = local_length. Padding that the layout adds holds 0 everywhere: text
        id 0 in no segment, without loss.

    Raises:
        ValueError: plans and rows do not match; names both.
    """
    _check(batch.tokens.shape[0], batch.tokens.shape[1], plans)
    length = batch.tokens.shape[1]
    indices = torch.stack([plan.local_indices(rank) for plan in plans]).to(batch.tokens.device)
    padding = indices >= length
    indices = indices.clamp(max=length - 1)
    shares = {
        name: getattr(batch, name).gather(1, indices).masked_fill_(padding, 0)
        for name in TENSOR_FIELDS
    }
    return replace(batch, **shares)


def restore(locals: Sequence[TrainBatch], plans: Sequence[RingPlan]) -> TrainBatch:
    """Whole rows from the shares of every rank: the inverse of ``cut``.

    Args:
        locals: one share a rank, in rank order, tensors [B, T].
        plans: the plans that cut them, one a row.

    Returns:
        Tensors [B, S] with S = context_length.

    Raises:
        ValueError: the number of shares is not that of the ring's ranks.
    """
    first = locals[0]
    length = plans[0].context_length
    _check(first.tokens.shape[0], length, plans)
    ranks = plans[0].ring_size * plans[0].heads_size
    if len(locals) != ranks:
        raise ValueError(f"{len(locals)} shares for a ring of {ranks}; pass every rank's share")
    rows = first.tokens.shape[0]
    whole: dict[str, Any] = {
        name: torch.zeros(
            rows,
            length,
            dtype=getattr(first, name).dtype,
            device=getattr(first, name).device,
        )
        for name in TENSOR_FIELDS
    }
    for rank, share in enumerate(locals):
        for row, plan in enumerate(plans):
            indices = plan.local_indices(rank).to(first.tokens.device)
            real = indices < length
            for name, tensor in whole.items():
                tensor[row, indices[real]] = getattr(share, name)[row, real]
    return replace(first, **whole)


def _check(rows: int, length: int, plans: Sequence[RingPlan]) -> None:
    if len(plans) != rows:
        raise ValueError(f"{len(plans)} ring plans for {rows} rows; give one plan a row")
    for row, plan in enumerate(plans):
        if plan.context_length != length:
            raise ValueError(
                f"plans[{row}].context_length={plan.context_length} but the rows hold {length} "
                "tokens; plan the ring with the rows' context_length"
            )
        if _shape(plan) != _shape(plans[0]):
            (ring, heads, tokens), (ring_0, heads_0, tokens_0) = _shape(plan), _shape(plans[0])
            raise ValueError(
                f"plans[{row}] gives each of {ring * heads} ranks {tokens} tokens, "
                f"plans[0] gives {ring_0 * heads_0} ranks {tokens_0}; plan the rows of one batch "
                "with the same ring size, heads size and layout"
            )


def _shape(plan: RingPlan) -> tuple[int, int, int]:
    return plan.ring_size, plan.heads_size, plan.local_length
