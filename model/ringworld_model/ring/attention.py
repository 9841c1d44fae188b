"""Ring attention: forward and backward over keys and values that travel around the ring.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width. K and V travel
un-expanded. Sums (out, lse, dq, dk, dv) are kept in fp32, or in fp64 where the inputs are fp64.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ringworld_model.ring.backend import choose_backend, ring_kernel
from ringworld_model.ring.check import agree, check_inputs, describe
from ringworld_model.ring.comm import Mail, Message, Ring, RingStats, Rotation
from ringworld_model.ring.kernel import RingKernel, RowGroup, accumulator, group_rows
from ringworld_model.ring.parcel import Load, Pair, add, empty_parcel, is_complete, pack, unpack
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
        call = _Call(ring, ring_kernel(chosen), group_rows(plans), scale, stats)
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


class _Call(NamedTuple):
    """What forward and backward share."""

    ring: Ring
    kernel: RingKernel
    rows: list[RowGroup]
    scale: float
    stats: RingStats


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call
    ) -> torch.Tensor:
        q, k, v = (_last_dim_contiguous(tensor) for tensor in (q, k, v))
        with call.stats.computing():
            own = call.kernel.forward(call.ring.rank, call.rows, q, call.scale)
        for step, keys, values in _visits(call, k, v):
            with call.stats.computing():
                own.step(step, keys, values)
        with call.stats.computing():
            out, lse = own.finish()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        call: _Call = ctx.call
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = _last_dim_contiguous(grad_out)
        with call.stats.computing():
            mine = call.kernel.backward(
                call.ring.rank, call.rows, grad_out, q, out, lse, call.scale
            )
        own = torch.zeros((2, *k.shape), dtype=accumulator(k.dtype), device=q.device)
        rank, size = call.ring.rank, call.ring.size
        travels = [plan.travel(rank) for _, plan in call.rows]

        def loads(way: str, step: int) -> list[Load]:
            return [
                Load(rows, getattr(travel, way)[step])
                for (rows, _), travel in zip(call.rows, travels, strict=True)
            ]

        onward, mail = (
            Rotation(call.ring, Message.GRADIENTS, call.stats),
            Mail(call.ring, call.stats),
        )
        arriving = own.new_empty(0)
        homecoming: list[tuple[torch.Tensor, list[Load]]] = []
        for step, keys, values in _visits(call, k, v):
            share = own if step == 0 else torch.zeros_like(own)
            with call.stats.computing():
                mine.step(step, keys, values, share[0], share[1])
            if step == 0:
                continue
            pair = (share[0], share[1])
            if step > 1:
                add(onward.finish(), pair, loads("gradients_in", step))
            if step < size - 1:
                arriving = empty_parcel(own[0], loads("gradients_in", step + 1))
                onward.start(pack(pair, loads("gradients_out", step)), arriving)
            mail.send(pack(pair, loads("home_out", step)), (rank - step) % size)
            home = loads("home_in", step)
            homecoming.append((empty_parcel(own[0], home), home))
            mail.receive(homecoming[-1][0], (rank + step) % size)
        mail.finish()
        for parcel, home in homecoming:
            add(parcel, (own[0], own[1]), home)
        with call.stats.computing():
            dq = mine.finish()
        return dq, own[0].to(k.dtype), own[1].to(v.dtype), None


def _visits(
    call: _Call, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (step, K, V) of each ring step's source, while the next step's are on their way.

    Only rows that this rank's plan names are meaningful after step 0.
    """
    ring = call.ring
    if ring.size == 1:
        yield 0, k, v
        return
    transfer = Rotation(ring, Message.KEYS_VALUES, call.stats)
    travels = [(rows, plan.travel(ring.rank)) for rows, plan in call.rows]
    leave = [
        [Load(rows, travel.keys_out[step]) for rows, travel in travels] for step in range(ring.size)
    ]
    arrive = [
        [Load(rows, travel.keys_in[step]) for rows, travel in travels] for step in range(ring.size)
    ]
    pair: Pair = (k, v)
    room: Pair | None = None
    outgoing = pack(pair, leave[0])
    for step in range(ring.size - 1):
        incoming = empty_parcel(k, arrive[step + 1])
        transfer.start(outgoing, incoming)
        yield step, *pair
        transfer.finish()
        if room is None and not is_complete(arrive[step + 1], k.shape[1]):
            room = (torch.empty_like(k), torch.empty_like(v))
        pair = unpack(incoming, room or pair, arrive[step + 1])
        # What goes on unchanged is not copied again.
        same = leave[step + 1] == arrive[step + 1]
        outgoing = incoming if same else pack(pair, leave[step + 1])
    yield ring.size - 1, *pair


def _last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
