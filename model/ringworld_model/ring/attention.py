"""Ring attention, as a differentiable function and as what a model passes to its layers.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width. Sums (out, lse, dq,
dk, dv) are kept in fp32, or in fp64 where the inputs are fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ringworld_model.config import check_head_split
from ringworld_model.ring.backend import choose_backend, explain_kernel, ring_kernel
from ringworld_model.ring.check import (
    agree,
    check_inputs,
    check_kinds,
    describe,
    waits_for_device,
)
from ringworld_model.ring.comm import Ring, RingStats
from ringworld_model.ring.heads import Heads, gather_heads, scatter_heads
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
    heads_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    softmax_scale: float | None = None,
    stats: RingStats | None = None,
) -> torch.Tensor:
    """Attend to the whole row's keys, of which this rank holds a part. Differentiable once.

    A collective, forward and backward: all ranks of ``group`` and ``heads_group`` call it, in the
    same order, with plans for the same rows.

    With ``heads_group``, the ranks of one ring place first exchange their tokens, so that each has
    a share of the heads and all of the place's tokens, and the ring turns once for each share.

    Args:
        q: [B, T, H, D], this rank's tokens in the order of ``plan.local_indices``.
        k: [B, T, Hkv, D], likewise; H is a multiple of Hkv.
        v: [B, T, Hkv, D].
        plan: one plan for all rows, or one for each, all of the same local_length.
        group: the ring: of each place the rank with this rank's share of the heads, ordered by
            place; None at ring_size 1.
        heads_group: the ranks of this rank's place, ordered as ``plan.local_indices`` orders their
            tokens; None at heads_size 1.
        backend: a block kernel, see ``choose_backend``.
        softmax_scale: factor of the scores; D ** -0.5 where None.
        stats: adds up where the time goes.

    Returns:
        [B, T, H, D], q's dtype. Padding tokens give 0 and get no gradient.

    Raises:
        ValueError: shapes, dtypes, devices, plans and groups do not fit together, or no kernel runs
            here. Raised on every rank, also where only one rank's inputs are wrong or the ranks'
            inputs differ, before anything is sent.
    """
    stats = RingStats() if stats is None else stats
    return _attend(q, k, v, plan, group, heads_group, backend, softmax_scale, stats, set())


@dataclass
class RingContext:
    """What attention needs to know of the ring: passed down to every layer.

    Before anything is sent, the ranks tell one another what they are about to do. On NCCL that
    costs the host a wait for the device, so there a context remembers what all ranks have agreed
    on: the first layer of a step asks, the others with the same shapes, dtype, plans and gradients
    do not. That rests on all ranks making, and using, their contexts alike, as the same program
    does; a rank that goes astray later in the context leaves the others waiting until the group's
    timeout. On other backends every call asks.

    Attributes:
        plans: one plan a row of the batch.
        group: the ring's process group; None at ring_size 1.
        heads_group: of the ranks that split the heads of one ring place; None at heads_size 1.
        backend: a block kernel, see ``choose_backend``.
        stats: adds up over calls, forward and backward, until it is reset.
    """

    plans: Sequence[RingPlan]
    group: dist.ProcessGroup | None
    backend: str = "auto"
    stats: RingStats = field(default_factory=RingStats)
    heads_group: dist.ProcessGroup | None = None
    _agreed: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return ``ring_attention`` of these tensors over this ring, adding to ``stats``."""
        return _attend(
            q,
            k,
            v,
            self.plans,
            self.group,
            self.heads_group,
            self.backend,
            None,
            self.stats,
            self._agreed if waits_for_device(self.group, self.heads_group) else set(),
        )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: RingPlan | Sequence[RingPlan],
    group: dist.ProcessGroup | None,
    heads_group: dist.ProcessGroup | None,
    backend: str,
    softmax_scale: float | None,
    stats: RingStats,
    agreed: set[str],
) -> torch.Tensor:
    """``ring_attention``; what the ranks agree on is added to ``agreed``, and not asked again."""
    call, heads, problem, terms = None, None, None, ""
    try:
        check_kinds(q, k, v, plan, softmax_scale)
        plans = [plan] * len(q) if isinstance(plan, RingPlan) else list(plan)
        check_inputs(q, k, v, plans)
        chosen, _ = choose_backend(q.device.type, str(q.dtype), backend, q.shape[-1])
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        ring = Ring.over(group, plans[0].ring_size)
        heads = Heads.over(heads_group, plans[0].heads_size)
        check_head_split(q.shape[2], k.shape[2], heads.size)
        # A rank without an op of the backend must say so while the others listen.
        explain_kernel(chosen, q.device, q.dtype, q.shape[-1])
        call = RingCall(ring, ring_kernel(chosen), group_rows(plans), scale, stats)
        terms = describe(q, k, v, plans, chosen, scale)
    except ValueError as error:
        problem = str(error)
    for name, members in (("group", group), ("heads_group", heads_group)):
        if members is not None and dist.get_rank(members) < 0:
            raise ValueError(f"this rank is not in the {name}; pass each rank its own")
    if problem is not None and agreed:
        # The others may not be listening any more.
        raise ValueError(problem)
    if terms not in agreed:
        device = q.device if isinstance(q, torch.Tensor) else torch.device("cpu")
        with stats.waiting(device):
            agree(group, heads_group, problem, terms)
        agreed.add(terms)
    out: torch.Tensor = _RingAttention.apply(q, k, v, call, heads)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: RingCall,
        heads: Heads,
    ) -> torch.Tensor:
        ctx.call, ctx.heads, ctx.num_heads = call, heads, (q.shape[2], k.shape[2], v.shape[2])
        q, k, v = (_last_dim_contiguous(tensor) for tensor in (q, k, v))
        q, k, v = scatter_heads((q, k, v), heads, call.stats)
        out, lse = ring_forward(call, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return gather_heads((out,), ctx.num_heads[:1], heads, call.stats)[0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        call, heads = ctx.call, ctx.heads
        q, k, v, out, lse = ctx.saved_tensors
        (grad_out,) = scatter_heads((_last_dim_contiguous(grad_out),), heads, call.stats)
        # Of a key head that several ranks share, only the sum is rounded.
        dtype = k.dtype if ctx.num_heads[1] >= heads.size else lse.dtype
        dq, dk, dv = ring_backward(call, grad_out, q, k, v, out, lse, dtype)
        dq, dk, dv = gather_heads((dq, dk, dv), ctx.num_heads, heads, call.stats)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
