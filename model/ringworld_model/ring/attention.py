"""Ring attention, as a differentiable function and as what a model passes to its layers.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width. Sums (out, lse, dq,
dk, dv) are kept in fp32, or in fp64 where the inputs are fp64.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ringworld_model.ring.backend import choose_backend, ring_kernel
from ringworld_model.ring.check import agree, check_inputs, describe
from ringworld_model.ring.comm import Ring, RingStats
from ringworld_model.ring.kernel import group_rows
from ringworld_model.ring.loop import RingCall, ring_backward, ring_forward
from ringworld_model.ring.plan import RingPlan


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: RingPlan | Sequence[RingPlan],
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    softmax_scale: float | None = None,
    stats: RingStats | None = None,
) -> torch.Tensor:
    """Attend to the whole row's keys, of which this rank holds a part. Differentiable once.

    A collective, forward and backward: all ranks of ``group`` call it, in the same order, with
    plans for the same rows.

    Args:
        q: [B, T, H, D], this rank's tokens in the order of ``plan.local_indices``.
        k: [B, T, Hkv, D], likewise; H is a multiple of Hkv.
        v: [B, T, Hkv, D].
        plan: one plan for all rows, or one for each, all of the same local_length.
        group: the ring; None at ring_size 1.
        backend: a block kernel, see ``choose_backend``.
        softmax_scale: factor of the scores; D ** -0.5 where None.
        stats: adds up where the time goes.

    Returns:
        [B, T, H, D], q's dtype. Padding tokens give 0 and get no gradient.

    Raises:
        ValueError: shapes, dtypes, devices, plans and group do not fit together, or no kernel runs
            here. Raised on every rank of the group, also where only one rank's inputs are wrong or
            the ranks' inputs differ, before anything is sent.
    """
    stats = RingStats() if stats is None else stats
    call, problem, terms = None, None, ""
    try:
        plans = [plan] * len(q) if isinstance(plan, RingPlan) else list(plan)
        check_inputs(q, k, v, plans)
        chosen, _ = choose_backend(q.device.type, str(q.dtype), backend, q.shape[-1])
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        ring = Ring.over(group, plans[0].ring_size)
        call = RingCall(ring, ring_kernel(chosen), group_rows(plans), scale, stats)
        terms = describe(q, k, plans, chosen, scale)
    except ValueError as error:
        problem = str(error)
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError("this rank is not in the group; pass each rank the ring it belongs to")
    began = time.perf_counter()
    agree(group, q.device, problem, terms)
    stats.wait_seconds += time.perf_counter() - began
    out: torch.Tensor = _RingAttention.apply(q, k, v, call)
    return out


@dataclass
class RingContext:
    """What attention needs to know of the ring: passed down to every layer.

    Attributes:
        plans: one plan a row of the batch.
        group: the ring's process group; None at ring_size 1.
        backend: a block kernel, see ``choose_backend``.
        stats: adds up over calls, forward and backward, until it is reset.
    """

    plans: Sequence[RingPlan]
    group: dist.ProcessGroup | None
    backend: str = "auto"
    stats: RingStats = field(default_factory=RingStats)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return ``ring_attention`` of these tensors over this ring, adding to ``stats``."""
        return ring_attention(
            q, k, v, plan=self.plans, group=self.group, backend=self.backend, stats=self.stats
        )


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: RingCall
    ) -> torch.Tensor:
        q, k, v = (_last_dim_contiguous(tensor) for tensor in (q, k, v))
        out, lse = ring_forward(call, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = _last_dim_contiguous(grad_out)
        dq, dk, dv = ring_backward(ctx.call, grad_out, q, k, v, out, lse)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
