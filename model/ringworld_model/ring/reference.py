"""Plain dense attention in fp64: the tests' oracle, and a slow block kernel for any device."""

from __future__ import annotations

import torch

from ringworld_model.ring.rectangle import Rectangle


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment_ids: torch.Tensor,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Attention of whole rows with the whole mask, differentiable, in fp64. Memory is quadratic.

    Args:
        q: [B, S, H, D], any float.
        k: [B, S, Hkv, D]; H is a multiple of Hkv.
        v: [B, S, Hkv, D].
        segment_ids: integer [B, S]; a query sees the keys of its own segment up to itself;
            segment 0 is padding.
        softmax_scale: D ** -0.5 where None.

    Returns:
        fp64 [B, S, H, D]; padding rows are 0 and pass on no gradient.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (tensor.to(torch.float64).transpose(1, 2) for tensor in (q, k, v))
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    length = q.shape[2]
    at = torch.arange(length, device=q.device)
    real = segment_ids != 0
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (at[:, None] >= at[None, :])
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask[:, None], -torch.inf)
    # Padding attends to padding here, which keeps NaN away; then its rows are cleared.
    out = torch.softmax(scores, -1) @ v
    return (out * real[:, None, :, None]).transpose(1, 2)


class ReferenceKernel:
    """A ``BlockKernel`` in fp64 matrix products, on any device; memory is queries times keys."""

    head_dims = range(1, 1025)

    def pieces(
        self, dtype: torch.dtype, rectangle: Rectangle, backward: bool
    ) -> list[tuple[Rectangle, bool]]:
        """See ``BlockKernel.pieces``: everything is whole, and fp64."""
        return [(rectangle, False)]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``BlockKernel.forward``; out is in lse's dtype."""
        scores = _scores(q, k, diagonal, scale)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        out = torch.exp(scores - lse) @ _grouped(v)
        result = torch.float64 if q.dtype == torch.float64 else torch.float32
        return out.reshape(q.shape).to(result), lse.reshape(q.shape[:-1]).to(result)

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        diagonal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``BlockKernel.backward``; gradients are in fp64."""
        groups = k.shape[1]
        split = (q.shape[0], groups, q.shape[1] // groups, q.shape[2], q.shape[3])
        grad_out, out, q64 = (
            tensor.to(torch.float64).reshape(split) for tensor in (grad_out, out, q)
        )
        weights = torch.exp(
            _scores(q, k, diagonal, scale) - lse.to(torch.float64).reshape(split[:-1])[..., None]
        )
        dv = (weights.transpose(-1, -2) @ grad_out).sum(2)
        delta = (grad_out * out).sum(-1, keepdim=True)
        dscores = weights * (grad_out @ _grouped(v).transpose(-1, -2) - delta) * scale
        dq = (dscores @ _grouped(k)).reshape(q.shape)
        dk = (dscores.transpose(-1, -2) @ q64).sum(2)
        return dq, dk, dv


def _grouped(tensor: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, K, D] -> fp64 [B, Hkv, 1, K, D], to stand against the query heads of each group."""
    return tensor.to(torch.float64).unsqueeze(2)


def _scores(q: torch.Tensor, k: torch.Tensor, diagonal: bool, scale: float) -> torch.Tensor:
    """fp64 [B, Hkv, H / Hkv, Q, K]; what a diagonal hides is -inf."""
    groups = k.shape[1]
    split = q.to(torch.float64).reshape(q.shape[0], groups, -1, q.shape[2], q.shape[3])
    scores = split @ _grouped(k).transpose(-1, -2) * scale
    if diagonal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores
