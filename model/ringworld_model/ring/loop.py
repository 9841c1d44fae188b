"""The ring loop: a kernel's passes over keys and values that travel, and gradients that go home.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width. K and V travel
un-expanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ringworld_model.ring.comm import Mail, Message, Ring, RingStats, Rotation
from ringworld_model.ring.kernel import RingKernel, RowGroup, accumulator
from ringworld_model.ring.parcel import Load, Pair, add, empty_parcel, is_complete, pack, unpack


class RingCall(NamedTuple):
    """What the forward and the backward pass of one call share."""

    ring: Ring
    kernel: RingKernel
    rows: list[RowGroup]
    scale: float
    stats: RingStats


def ring_forward(
    call: RingCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the keys of all ranks.

    Args:
        call: the ring, kernel and plans.
        q: [B, T, H, D], the last dim contiguous.
        k: [B, T, Hkv, D], likewise.
        v: [B, T, Hkv, D], likewise.

    Returns:
        See ``ForwardPass.finish``.
    """
    with call.stats.computing():
        mine = call.kernel.forward(call.ring.rank, call.rows, q, call.scale)
    for step, keys, values in _visits(call, k, v):
        with call.stats.computing():
            mine.step(step, keys, values)
    with call.stats.computing():
        return mine.finish()


def ring_backward(
    call: RingCall,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of this rank's tokens.

    Args:
        call: as in the forward pass.
        grad_out: [B, T, H, D], q's dtype, the last dim contiguous.
        q: as in the forward pass.
        k: as in the forward pass.
        v: as in the forward pass.
        out: what the forward pass gave.
        lse: what the forward pass gave.

    Returns:
        dq [B, T, H, D] in q's dtype; dk, dv [B, T, Hkv, D] in fp32 (fp64 for fp64 inputs).
    """
    with call.stats.computing():
        mine = call.kernel.backward(call.ring.rank, call.rows, grad_out, q, out, lse, call.scale)
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
    return dq, own[0], own[1]


def _visits(
    call: RingCall, k: torch.Tensor, v: torch.Tensor
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
