"""Ring attention: forward and backward over keys and values that travel around the ring.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width. K and V travel
un-expanded. Sums (out, lse, dq, dk, dv) are kept in fp32, or in fp64 where the inputs are fp64.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ringworld_model.ring.backend import block_kernel, choose_backend
from ringworld_model.ring.check import agree, check_inputs, describe
from ringworld_model.ring.comm import Message, Ring, RingStats, Rotation
from ringworld_model.ring.plan import RingPlan
from ringworld_model.ring.steps import RingCall, backward_step, forward_step, group_rows


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
        call = RingCall(ring, block_kernel(chosen), group_rows(plans), scale, stats)
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
        batch, length, heads, _ = q.shape
        exact = _accumulator(q.dtype)
        total = torch.zeros(q.shape, dtype=exact, device=q.device)
        lse = q.new_full((batch, heads, length), -torch.inf, dtype=exact)
        ring = call.ring
        transfer = Rotation(ring, Message.KEYS_VALUES, call.stats)
        travelling, spare = _travellers(ring, k, v)
        for step in range(ring.size):
            if step < ring.size - 1:
                transfer.start(travelling, spare)
            keys, values = (k, v) if step == 0 else travelling.unbind(0)
            forward_step(call, step, q, keys, values, total, lse)
            if step < ring.size - 1:
                travelling, spare = transfer.finish(), travelling
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        call: RingCall = ctx.call
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = _last_dim_contiguous(grad_out)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        share = torch.zeros((2, *k.shape), dtype=lse.dtype, device=q.device)
        ring = call.ring
        if ring.size == 1:
            backward_step(call, 0, (grad_out, q, k, v, out, lse), dq, share)
            return dq.to(q.dtype), share[0].to(k.dtype), share[1].to(v.dtype), None
        transfer = Rotation(ring, Message.KEYS_VALUES, call.stats)
        homeward = Rotation(ring, Message.GRADIENTS, call.stats)
        travelling, spare = _travellers(ring, k, v)
        # The gradients of a block follow one hop behind it, and gather each rank's share: `carried`
        # is on its way out, `arriving` on its way in, while `share` is computed.
        carried, arriving = torch.empty_like(share), torch.empty_like(share)
        for step in range(ring.size):
            if step < ring.size - 1:
                transfer.start(travelling, spare)
            keys, values = (k, v) if step == 0 else travelling.unbind(0)
            share.zero_()
            backward_step(call, step, (grad_out, q, keys, values, out, lse), dq, share)
            if step < ring.size - 1:
                travelling, spare = transfer.finish(), travelling
            if step == 0:
                carried.copy_(share)
            else:
                carried, arriving = homeward.finish().add_(share), carried
            homeward.start(carried, arriving)
        dk, dv = homeward.finish().unbind(0)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _travellers(ring: Ring, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V in one message, and the buffer that the next one arrives in; nothing at size 1."""
    if ring.size == 1:
        return k, v
    message = torch.stack((k, v))
    return message, torch.empty_like(message)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
