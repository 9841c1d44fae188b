"""Weighted cross-entropy in tiles, and the sums from which the global loss is made.

Sums, never means: a rank's mean cannot be combined with another's, since each holds another number
of targets.

Legend: N targets, V vocabulary, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

POSITION_BUCKETS = 16
"""Buckets of ``LossSums.by_position``."""
FIRST_BUCKET_TOKENS = 256
"""Positions of the first bucket; each further one is as long as all before it: the second is
256-511, the third 512-1023, and the last open to the end."""


@dataclass
class LossSums:
    """Sums over one rank's targets, index 0 text, 1 vision.

    Attributes:
        nll: [2], sum of weight * negative log-likelihood; the one that gradients flow through.
            float32 (float64 for a model in double precision).
        weight: float64 [2], sum of the loss weights.
        correct: float64 [2], sum of the weights of targets that the model ranks first.
        count: int64 [2], targets with a weight above 0.
        by_position: float64 [2, POSITION_BUCKETS, 2], nll and weight of the targets by how far into
            their document they stand. No gradient flows through it.
    """

    nll: Tensor
    weight: Tensor
    correct: Tensor
    count: Tensor
    by_position: Tensor


def bucket_edges(context_length: int) -> list[int]:
    """First position of each bucket that a context reaches, and the context's end.

    Args:
        context_length: tokens of a row.
    """
    starts = [0, *(FIRST_BUCKET_TOKENS << i for i in range(POSITION_BUCKETS - 1))]
    return [start for start in starts if start < context_length] + [context_length]


def combine(
    sums: LossSums,
    global_weight: Tensor,
    modality_weights: tuple[float, float],
    factor: float = 1.0,
) -> Tensor:
    """This rank's part of the global loss: added over all ranks it is the loss times ``factor``.

    ``factor * sum_m share_m * nll_m / global_weight_m``, where the shares are modality_weights
    scaled to sum to 1 over the modalities that have any weight in the global batch.

    Args:
        sums: of this rank and this micro-batch.
        global_weight: [2], sum of the loss weights over all ranks and micro-batches of the step.
        modality_weights: of text and vision, 0 or more.
        factor: what the engine divides by: world size * accumulation steps.

    Returns:
        Scalar, dtype of ``sums.nll``. Zero, with zero gradients, where no share is above 0.
    """
    weight = global_weight.to(sums.nll.device, torch.float64)
    shares = torch.tensor(modality_weights, dtype=torch.float64, device=weight.device)
    shares = torch.where(weight > 0, shares, 0.0)
    divisor = shares.sum() * weight
    scale = torch.where(shares > 0, shares / torch.where(shares > 0, divisor, 1.0), 0.0)
    return (sums.nll * (scale * factor).to(sums.nll.dtype)).sum()


class VocabularyHead(nn.Module):
    """A head and its loss: logits exist for ``tile_tokens`` targets at a time, never for all.

    Attributes:
        weight: [V, E].
    """

    def __init__(self, hidden_size: int, vocab_size: int, tile_tokens: int) -> None:
        """Allocate the weight, uninitialised.

        Raises:
            ValueError: tile_tokens below 1.
        """
        super().__init__()
        if tile_tokens < 1:
            raise ValueError(f"loss.tile_tokens={tile_tokens} is below 1; 2048 is usual")
        self.weight: Tensor = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.tile_tokens = tile_tokens

    def forward(
        self, hidden: Tensor, targets: Tensor, loss_weights: Tensor, position_ids: Tensor
    ) -> Sums:
        """Sums over the targets. Call it once a forward pass on every rank, with N = 0 if need be.

        Under ZeRO-3 a call is a collective, so a rank that skips it stalls the others. Returned is
        a plain tuple, because ZeRO-3 finds tensors in nothing else.

        Args:
            hidden: [N, E].
            targets: int64 [N].
            loss_weights: [N], above 0.
            position_ids: ints [N], place of each in its document.

        Returns:
            One modality's part of each sum of ``LossSums``, in its order.
        """
        nll, correct, each = _TiledCrossEntropy.apply(
            hidden, self.weight, targets, loss_weights, self.tile_tokens, torch.is_grad_enabled()
        )
        count = torch.tensor(len(targets), device=hidden.device)
        edges = bucket_edges(FIRST_BUCKET_TOKENS << POSITION_BUCKETS)[1:-1]
        bucket = torch.bucketize(
            position_ids, torch.tensor(edges, device=hidden.device), right=True
        )
        weights = loss_weights.double()
        pairs = torch.stack([each, weights], dim=1)
        by_position = pairs.new_zeros(POSITION_BUCKETS, 2).index_add_(0, bucket, pairs)
        return nll, weights.sum(), correct, count, by_position

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of every position, for generation: [..., E] -> float32 [..., V].

        Not for training: it bypasses the module call that ZeRO-3 gathers the weight in.
        """
        return nn.functional.linear(hidden, self.weight).to(_at_least_fp32(hidden.dtype))


class _TiledCrossEntropy(torch.autograd.Function):
    """Sum of weight * nll, with both gradients made in the forward pass; and its summands.

    The gradient of a sum over targets needs nothing that comes later but one scalar, so each tile's
    logits are used for the loss and for the gradients, then dropped: three matrix products instead
    of the four of recomputation. ``backward`` multiplies by that scalar, so any factor put on the
    loss afterwards reaches both gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        tile_tokens: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _at_least_fp32(hidden.dtype)
        nll = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
        correct = torch.zeros((), dtype=torch.float64, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if with_gradients else None
        weight_grad = torch.zeros_like(weight, dtype=dtype) if with_gradients else None
        for start in range(0, len(targets), tile_tokens):
            tile = slice(start, start + tile_tokens)
            rows, wanted = hidden[tile], targets[tile, None]
            scale = loss_weights[tile].to(dtype)
            logits = (rows @ weight.T).to(dtype)
            highest, guess = logits.max(dim=1)
            found = logits.gather(1, wanted).squeeze(1)
            exps = logits.sub_(highest[:, None]).exp_()
            total = exps.sum(dim=1)
            nll[tile] = scale * (highest + total.log() - found)
            correct += scale[guess == wanted.squeeze(1)].sum()
            if hidden_grad is None or weight_grad is None:
                continue
            grad = exps.mul_((scale / total)[:, None])
            grad.scatter_add_(1, wanted, -scale[:, None])
            grad = grad.to(weight.dtype)
            hidden_grad[tile] = grad @ weight
            if weight_grad.dtype == grad.dtype:
                weight_grad.addmm_(grad.T, rows)
            else:
                weight_grad += grad.T @ rows
        if hidden_grad is not None and weight_grad is not None:
            ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(correct, nll)
        return nll.sum().to(dtype), correct, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0], weight_grad * grads[0], None, None, None, None


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
