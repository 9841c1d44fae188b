"""The ring loop: a kernel's passes over keys and values that travel, and gradients that go home.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width. K and V travel
un-expanded. Everything is done for a few key heads at a time (a chunk): the ring turns once for
each, sends the same bytes in all, and needs memory for what travels of one chunk only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ringworld_model.ring.comm import Exchange, Message, Parcel, Ring, RingStats
from ringworld_model.ring.kernel import RingKernel, RowGroup, accumulator
from ringworld_model.ring.parcel import Load, Pair, add, empty_parcel, is_complete, pack, unpack

# What dK takes of one chunk, in bytes of the accumulator. Less costs kernel calls on CPU, and on a
# device that computes heads side by side it leaves too few of them, and too small messages.
_CHUNK_BYTES = {"cpu": 4 << 20}
_DEVICE_CHUNK_BYTES = 64 << 20

Moment = tuple[list[Parcel], list[Parcel]]
"""What is sent and what is received while one step is computed."""


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
    chunks = _chunks(q, k)
    if len(chunks) == 1:
        return _forward(call, q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = out.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
    for heads, kv_heads in chunks:
        found = _forward(call, q[:, :, heads], k[:, :, kv_heads], v[:, :, kv_heads])
        out[:, :, heads], lse[:, heads] = found
    return out, lse


def ring_backward(
    call: RingCall,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dtype: torch.dtype,
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
        dtype: what dk and dv, summed in fp32 (fp64 for fp64 inputs), are returned in.

    Returns:
        dq [B, T, H, D] in q's dtype; dk, dv [B, T, Hkv, D].
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=dtype, device=k.device) for _ in range(2))
    for heads, kv_heads in _chunks(q, k):
        dq[:, :, heads], (dk[:, :, kv_heads], dv[:, :, kv_heads]) = _backward(
            call,
            grad_out[:, :, heads],
            q[:, :, heads],
            k[:, :, kv_heads],
            v[:, :, kv_heads],
            out[:, :, heads],
            lse[:, heads],
        )
    return dq, dk, dv


def _forward(
    call: RingCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ring_forward`` of one chunk."""
    with call.stats.computing(q.device):
        mine = call.kernel.forward(call.ring.rank, call.rows, q, call.scale)
    exchange = Exchange(call.ring, call.stats)
    keys = _Keys(call, k, v)
    for step in range(call.ring.size):
        exchange.post(*keys.leave(step))
        with call.stats.computing(q.device):
            mine.step(step, *keys.pair)
        exchange.finish()
        keys.arrive(step)
    del keys
    with call.stats.computing(q.device):
        return mine.finish()


def _backward(
    call: RingCall,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ring_backward`` of one chunk: dq, and the sums of dk and dv as one tensor [2, ...]."""
    with call.stats.computing(q.device):
        mine = call.kernel.backward(call.ring.rank, call.rows, grad_out, q, out, lse, call.scale)
    exchange = Exchange(call.ring, call.stats)
    keys = _Keys(call, k, v)
    gradients = _Gradients(call, k)
    for step in range(call.ring.size):
        moment = zip(keys.leave(step), gradients.leave(step), strict=True)
        exchange.post(*(first + second for first, second in moment))
        with call.stats.computing(q.device):
            mine.step(step, *keys.pair, *gradients.share(step))
        exchange.finish()
        gradients.arrive(step)
        keys.arrive(step)
    del keys
    exchange.post(*gradients.leave(call.ring.size))
    with call.stats.computing(q.device):
        dq = mine.finish()
    exchange.finish()
    gradients.arrive(call.ring.size)
    return dq, gradients.own


class _Keys:
    """K and V at hand, while the next step's are on their way.

    Attributes:
        pair: K and V of the present step's source, [B, T, Hkv, D]. Only rows that this rank's plan
            names are meaningful after step 0.
    """

    def __init__(self, call: RingCall, k: torch.Tensor, v: torch.Tensor) -> None:
        self.pair: Pair = (k, v)
        self._call = call
        self._room: Pair | None = None
        self._arriving: torch.Tensor | None = None

    def leave(self, step: int) -> Moment:
        """Send on what later ranks need, and receive what the next step needs."""
        arrived, self._arriving = self._arriving, None
        if step == self._call.ring.size - 1:
            return [], []
        rank, leaving = self._call.ring.rank, _loads(self._call, "keys_out", step)
        # What goes on unchanged is not copied again.
        same = arrived is not None and leaving == _loads(self._call, "keys_in", step)
        sent = arrived if arrived is not None and same else pack(self.pair, leaving)
        self._arriving = empty_parcel(self.pair[0], _loads(self._call, "keys_in", step + 1))
        return (
            [Parcel(Message.KEYS_VALUES, sent, rank + 1)],
            [Parcel(Message.KEYS_VALUES, self._arriving, rank - 1)],
        )

    def arrive(self, step: int) -> None:
        """Make ``pair`` the next step's."""
        if self._arriving is None or self._arriving.numel() == 0:
            return
        loads = _loads(self._call, "keys_in", step + 1)
        if self._room is None and not is_complete(loads, self.pair[0].shape[1]):
            shape = self.pair[0].shape
            self._room = (self.pair[0].new_empty(shape), self.pair[1].new_empty(shape))
        self.pair = unpack(self._arriving, self._room or self.pair, loads)


class _Gradients:
    """Gradients of keys and values: of this rank's own, and of those that visit it.

    Attributes:
        own: dK and dV of this rank's keys, [2, B, T, Hkv, D]; complete after the last arrival.
    """

    def __init__(self, call: RingCall, k: torch.Tensor) -> None:
        self._call = call
        self.own = torch.zeros((2, *k.shape), dtype=accumulator(k.dtype), device=k.device)
        self._share = self.own
        self._onward = self._home = self.own.new_empty(0)

    def share(self, step: int) -> Pair:
        """Where the step's source gets its gradients: [B, T, Hkv, D] each."""
        # Nothing is added at a step after which no gradient leaves.
        ways = ("gradients_out", "home_out")
        if step > 0 and any(load.spans for way in ways for load in _loads(self._call, way, step)):
            self._share = torch.zeros_like(self.own)
        return self._share[0], self._share[1]

    def leave(self, step: int) -> Moment:
        """Send the last step's sums onward or home, and receive as much."""
        rank, size = self._call.ring.rank, self._call.ring.size
        before = step - 1
        if before < 1:
            return [], []
        pair = (self._share[0], self._share[1])
        onward = pack(pair, _loads(self._call, "gradients_out", before))
        homeward = pack(pair, _loads(self._call, "home_out", before))
        self._share = self.own
        coming = _loads(self._call, "gradients_in", step) if step < size else []
        self._onward = empty_parcel(self.own[0], coming)
        self._home = empty_parcel(self.own[0], _loads(self._call, "home_in", before))
        return (
            [
                Parcel(Message.GRADIENTS, onward, rank + 1),
                Parcel(Message.HOME, homeward, rank - before),
            ],
            [
                Parcel(Message.GRADIENTS, self._onward, rank - 1),
                Parcel(Message.HOME, self._home, rank + before),
            ],
        )

    def arrive(self, step: int) -> None:
        """Add what has come: the earlier ranks' sums to this rank's share, and what came home."""
        if step < 2:
            return
        if step < self._call.ring.size:
            pair = (self._share[0], self._share[1])
            add(self._onward, pair, _loads(self._call, "gradients_in", step))
        add(self._home, (self.own[0], self.own[1]), _loads(self._call, "home_in", step - 1))
        self._onward = self._home = self.own.new_empty(0)


def _loads(call: RingCall, way: str, step: int) -> list[Load]:
    """What takes one of the ``Travel`` ways at a step."""
    return [Load(rows, getattr(plan.travel(call.ring.rank), way)[step]) for rows, plan in call.rows]


def _chunks(q: torch.Tensor, k: torch.Tensor) -> list[tuple[slice, slice]]:
    """Query heads and key heads of each chunk; follows from shapes that all ranks share."""
    batch, length, kv_heads, width = k.shape
    head_bytes = batch * length * width * accumulator(k.dtype).itemsize
    most = max(1, _CHUNK_BYTES.get(k.device.type, _DEVICE_CHUNK_BYTES) // head_bytes)
    count = -(-kv_heads // most)
    ratio = q.shape[2] // kv_heads
    bounds = [kv_heads * at // count for at in range(count + 1)]
    return [
        (slice(start * ratio, stop * ratio), slice(start, stop))
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
    ]
