"""The ring loop: a kernel's passes over keys and values that travel, and gradients that go home.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width. K and V travel
un-expanded. Everything is done for a few key heads at a time (a chunk): the ring turns once for
each, sends the same bytes in all, and needs memory for what travels of one chunk only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ringworld_model.ring.comm import Exchange, Message, Parcel, Ring, RingStats
from ringworld_model.ring.kernel import RingKernel, RowGroup, accumulator
from ringworld_model.ring.parcel import (
    Load,
    Pair,
    Pool,
    add,
    as_pair,
    empty_parcel,
    is_complete,
    is_parcel,
    pack,
    unpack,
)

# What dK takes of one chunk, at most, in bytes of the accumulator. Smaller chunks cost kernel calls
# on CPU, some 0.1 to 0.3 ms a rectangle beside the kernel's own time (measured), and on a device
# that computes heads side by side they leave too few of them, and too small messages.
_CHUNK_BYTES, _DEVICE_CHUNK_BYTES = {"cpu": 8 << 20}, 64 << 20
# Of all heads, to be one chunk in the backward pass, where twice as much travels, and in fp32. One
# chunk of 8 MiB would save 3 % of the time of short documents, and take 30 MiB more (measured).
_WHOLE_BYTES = {"cpu": 4 << 20}

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
        out [B, T, H, D] in q's dtype; lse [B, H, T]; see ``ForwardPass.finish``.
    """
    chunks = _chunks(q, k, _CHUNK_BYTES)
    pool = Pool(k[:, :, chunks[0][1]], k.dtype)
    if len(chunks) == 1:
        out, lse = _forward(call, pool, q, k, v)
        return out.to(q.dtype), lse
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = out.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
    for heads, kv_heads in chunks:
        found = _forward(call, pool, q[:, :, heads], k[:, :, kv_heads], v[:, :, kv_heads])
        out[:, :, heads], lse[:, heads] = found
        del found
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
    chunks = _chunks(q, k, _WHOLE_BYTES)
    pool = Pool(k[:, :, chunks[0][1]], lse.dtype)
    for heads, kv_heads in chunks:
        dq[:, :, heads], own = _backward(
            call,
            pool,
            grad_out[:, :, heads],
            q[:, :, heads],
            k[:, :, kv_heads],
            v[:, :, kv_heads],
            out[:, :, heads],
            lse[:, heads],
        )
        dk[:, :, kv_heads], dv[:, :, kv_heads] = own
        pool.give(own[0])
    return dq, dk, dv


def _forward(
    call: RingCall, pool: Pool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ring_forward`` of one chunk, what travels in memory of ``pool``."""
    with call.stats.computing(q.device):
        mine = call.kernel.forward(call.ring.rank, call.rows, q, call.scale)
    exchange = Exchange(call.ring, call.stats)
    keys = _Keys(call, pool, k, v)
    for step in range(call.ring.size):
        exchange.post(*keys.leave(step))
        with call.stats.computing(q.device):
            mine.step(step, *keys.pair)
        exchange.finish()
        keys.arrive(step)
    keys.end()
    with call.stats.computing(q.device):
        return mine.finish()


def _backward(
    call: RingCall,
    pool: Pool,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, Pair]:
    """``ring_backward`` of one chunk: dq, and the sums of dk and dv, which lie in the pool."""
    with call.stats.computing(q.device):
        mine = call.kernel.backward(call.ring.rank, call.rows, grad_out, q, out, lse, call.scale)
    exchange = Exchange(call.ring, call.stats)
    keys = _Keys(call, pool, k, v)
    gradients = _Gradients(call, pool, k, lse.dtype)
    for step in range(call.ring.size):
        moment = zip(keys.leave(step), gradients.leave(step), strict=True)
        exchange.post(*(first + second for first, second in moment))
        with call.stats.computing(q.device):
            mine.step(step, *keys.pair, *gradients.share(step))
        exchange.finish()
        gradients.arrive(step)
        keys.arrive(step)
    keys.end()
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

    def __init__(self, call: RingCall, pool: Pool, k: torch.Tensor, v: torch.Tensor) -> None:
        self.pair: Pair = (k, v)
        self._call, self._pool = call, pool
        self._came: torch.Tensor | None = None
        self._packed: torch.Tensor | None = None
        self._coming: torch.Tensor | None = None
        # Of the pool: what came, if anything has, and what it is unpacked into.
        self._kept: torch.Tensor | None = None
        self._room: torch.Tensor | None = None

    def leave(self, step: int) -> Moment:
        """Send on what later ranks need, and receive what the next step needs."""
        came, self._came = self._came, None
        if step == self._call.ring.size - 1:
            return [], []
        rank, leaving = self._call.ring.rank, _loads(self._call, "keys_out", step)
        # What goes on unchanged is not copied again.
        if came is not None and leaving == _loads(self._call, "keys_in", step):
            sent = came
        else:
            sent = pack(self.pair, leaving, self._pool)
            self._packed = None if is_parcel(self.pair, leaving) else sent
        coming = _loads(self._call, "keys_in", step + 1)
        like = self.pair[0]
        self._coming = empty_parcel(like, like.dtype, coming, self._pool)
        return (
            [Parcel(Message.KEYS_VALUES, sent, rank + 1)],
            [Parcel(Message.KEYS_VALUES, self._coming, rank - 1)],
        )

    def arrive(self, step: int) -> None:
        """Make ``pair`` the next step's."""
        self._pool.give(self._packed)
        self._packed = None
        self._came, self._coming = self._coming, None
        if self._came is None or self._came.numel() == 0:
            return
        loads, like = _loads(self._call, "keys_in", step + 1), self.pair[0]
        if self._room is None and not is_complete(loads, like.shape[1]):
            self._room = self._pool.take(like, like.dtype)
        room = self.pair if self._room is None else as_pair(self._room, like)
        self.pair = unpack(self._came, room, loads)
        self._pool.give(self._kept)
        self._kept = self._came

    def end(self) -> None:
        """Give all memory back to the pool. ``pair`` must not be used any more."""
        self._pool.give(self._kept, self._room)
        self._kept = self._room = None


class _Gradients:
    """Gradients of keys and values: of this rank's own, and of those that visit it.

    Attributes:
        own: dK and dV of this rank's keys, [B, T, Hkv, D] each, in memory of the pool; complete
            after the last arrival.
    """

    def __init__(self, call: RingCall, pool: Pool, k: torch.Tensor, dtype: torch.dtype) -> None:
        self._call, self._pool, self._like, self._dtype = call, pool, k, dtype
        self.own = as_pair(pool.take(k, dtype).zero_(), k)
        self._share = self.own
        # Of the pool: the share, what is packed, and what comes onward and home.
        self._flat: torch.Tensor | None = None
        self._packed: list[torch.Tensor | None] = []
        self._onward = self._home = k.new_empty(0)

    def share(self, step: int) -> Pair:
        """Where the step's source gets its gradients: [B, T, Hkv, D] each."""
        # Nothing is added at a step after which no gradient leaves.
        ways = ("gradients_out", "home_out")
        if step > 0 and any(load.spans for way in ways for load in _loads(self._call, way, step)):
            self._flat = self._pool.take(self._like, self._dtype).zero_()
            self._share = as_pair(self._flat, self._like)
        return self._share

    def leave(self, step: int) -> Moment:
        """Send the last step's sums onward or home, and receive as much."""
        rank, size = self._call.ring.rank, self._call.ring.size
        before = step - 1
        if before < 1:
            return [], []
        leaving = [_loads(self._call, way, before) for way in ("gradients_out", "home_out")]
        onward, homeward = (pack(self._share, loads, self._pool) for loads in leaving)
        if any(is_parcel(self._share, loads) for loads in leaving):
            self._packed = [self._flat]
        else:
            # What comes may take the share's place.
            self._pool.give(self._flat)
            self._packed = [onward, homeward]
        self._flat = None
        self._share = self.own
        coming = _loads(self._call, "gradients_in", step) if step < size else []
        home = _loads(self._call, "home_in", before)
        self._onward, self._home = (
            empty_parcel(self._like, self._dtype, loads, self._pool) for loads in (coming, home)
        )
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
            add(self._onward, self._share, _loads(self._call, "gradients_in", step))
        add(self._home, self.own, _loads(self._call, "home_in", step - 1))
        self._pool.give(*self._packed, self._onward, self._home)
        self._packed = []
        self._onward = self._home = self._like.new_empty(0)


def _loads(call: RingCall, way: str, step: int) -> list[Load]:
    """What takes one of the ``Travel`` ways at a step."""
    return [Load(rows, getattr(plan.travel(call.ring.rank), way)[step]) for rows, plan in call.rows]


def _chunks(
    q: torch.Tensor, k: torch.Tensor, whole_bytes: Mapping[str, int]
) -> list[tuple[slice, slice]]:
    """Query heads and key heads of each chunk; follows from shapes that all ranks share.

    Args:
        q: [B, T, H, D].
        k: [B, T, Hkv, D].
        whole_bytes: by device type, up to which all heads are one chunk.
    """
    batch, length, kv_heads, width = k.shape
    head_bytes = batch * length * width * accumulator(k.dtype).itemsize
    device = k.device.type
    count = 1
    if kv_heads * head_bytes > whole_bytes.get(device, _DEVICE_CHUNK_BYTES):
        most = max(1, _CHUNK_BYTES.get(device, _DEVICE_CHUNK_BYTES) // head_bytes)
        count = min(kv_heads, max(2, -(-kv_heads // most)))
    ratio = q.shape[2] // kv_heads
    # The largest first, in whose memory the others find room.
    bounds = [-(-kv_heads * at // count) for at in range(count + 1)]
    return [
        (slice(start * ratio, stop * ratio), slice(start, stop))
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
    ]
