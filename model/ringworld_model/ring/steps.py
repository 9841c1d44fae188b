"""One ring step of one rank: the plan's rectangles through the block kernel, without any transfer.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ringworld_model.ring.comm import Ring, RingStats
from ringworld_model.ring.kernel import BlockKernel
from ringworld_model.ring.merge import merge_
from ringworld_model.ring.plan import RingPlan


class RowGroup(NamedTuple):
    """Neighbouring rows of the batch that share a plan: one kernel call serves them all."""

    rows: slice
    plan: RingPlan


class RingCall(NamedTuple):
    """What all steps of one call share, forward and backward."""

    ring: Ring
    kernel: BlockKernel
    rows: list[RowGroup]
    scale: float
    stats: RingStats


def group_rows(plans: Sequence[RingPlan]) -> list[RowGroup]:
    """Group neighbouring rows of equal plans; ``plans`` holds one a row."""
    groups: list[RowGroup] = []
    start = 0
    for end in range(1, len(plans) + 1):
        if end == len(plans) or plans[end] != plans[start]:
            groups.append(RowGroup(slice(start, end), plans[start]))
            start = end
    return groups


def forward_step(
    call: RingCall,
    step: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merge what this rank's queries see at one ring step into ``out`` and ``lse``, in place.

    Args:
        call: the ring, kernel and plans.
        step: ring step, 0 to R - 1.
        q: [B, T, H, D].
        k: [B, T, Hkv, D], of the rank that the step is about.
        v: [B, T, Hkv, D].
        out: [B, T, H, D], the accumulator's dtype.
        lse: [B, H, T], the accumulator's dtype.
    """
    began = time.perf_counter()
    q, k, v, out = (tensor.transpose(1, 2) for tensor in (q, k, v, out))
    for rows, plan in call.rows:
        for q0, q1, k0, k1, diagonal in plan.rectangles(call.ring.rank, step):
            block = call.kernel.forward(
                q[rows, :, q0:q1], k[rows, :, k0:k1], v[rows, :, k0:k1], diagonal, call.scale
            )
            merge_(out[rows, :, q0:q1], lse[rows, :, q0:q1], *block)
    call.stats.compute_seconds += time.perf_counter() - began


def backward_step(
    call: RingCall,
    step: int,
    saved: tuple[torch.Tensor, ...],
    dq: torch.Tensor,
    dkv: torch.Tensor,
) -> None:
    """Add one ring step's share of the gradients to ``dq`` and ``dkv``, in place.

    Args:
        call: the ring, kernel and plans.
        step: ring step, 0 to R - 1.
        saved: grad_out, q, k, v, out (each [B, T, heads, D]; k and v of the rank that the step is
            about) and lse [B, H, T], out and lse over the whole row's keys.
        dq: [B, T, H, D], the accumulator's dtype.
        dkv: [2, B, T, Hkv, D], the accumulator's dtype.
    """
    began = time.perf_counter()
    grad_out, q, k, v, out = (tensor.transpose(1, 2) for tensor in saved[:5])
    lse = saved[5]
    dq, dk, dv = dq.transpose(1, 2), dkv[0].transpose(1, 2), dkv[1].transpose(1, 2)
    for rows, plan in call.rows:
        for q0, q1, k0, k1, diagonal in plan.rectangles(call.ring.rank, step):
            queries, keys = (rows, slice(None), slice(q0, q1)), (rows, slice(None), slice(k0, k1))
            block_dq, block_dk, block_dv = call.kernel.backward(
                grad_out[queries],
                q[queries],
                k[keys],
                v[keys],
                out[queries],
                lse[queries],
                diagonal,
                call.scale,
            )
            dq[queries].add_(block_dq)
            dk[keys].add_(block_dk)
            dv[keys].add_(block_dv)
    call.stats.compute_seconds += time.perf_counter() - began
