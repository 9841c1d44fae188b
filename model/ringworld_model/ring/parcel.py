"""Parcels: the rows of a rank's K and V, or of their gradients, that travel in one message.

B rows of the batch, T local tokens, Hkv key heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ringworld_model.ring.heap import keep_freed_memory
from ringworld_model.ring.spans import Spans

Pair = tuple[torch.Tensor, torch.Tensor]
"""K and V, or dK and dV: each [B, T, Hkv, D]."""

_MANY = 32
"""Spans from which on their rows are copied by a list, in one operation. A thousand single copies
take 5 ms, the list of 8,000 rows 0.1 to 0.6 (measured, CPU); on a GPU each would be a launch."""


class Load(NamedTuple):
    """The local rows that neighbouring rows of the batch (equal plans) put into a parcel."""

    rows: slice
    spans: Spans


class Pool:
    """Memory for pairs and parcels, used again by the steps and chunks of one call."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype) -> None:
        """Begin with nothing.

        Args:
            like: as large as any that ``take`` gets, and on the device of all the memory.
            dtype: the widest that is taken.
        """
        self._device = like.device
        self._size = 2 * like.numel() * dtype.itemsize
        self._free: list[torch.Tensor] = []
        if like.device.type == "cpu":
            keep_freed_memory()

    def take(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Room for two tensors of the shape of ``like``, one after the other: [elements].

        It holds anything.
        """
        if not self._free:
            self._free.append(torch.empty(self._size, dtype=torch.uint8, device=self._device))
        return self._free.pop()[: 2 * like.numel() * dtype.itemsize].view(dtype)

    def give(self, *parts: torch.Tensor | None) -> None:
        """Take back what nobody reads or writes any more but work that the current stream awaits.

        Args:
            parts: each a contiguous part of something else that ``take`` gave; or empty, or None.
        """
        for part in parts:
            if part is not None and part.numel():
                raw = part.flatten().view(torch.uint8)
                self._free.append(raw.as_strided((self._size,), (1,), 0))


def as_pair(flat: torch.Tensor, like: torch.Tensor) -> Pair:
    """Two tensors of the shape of ``like`` in what ``Pool.take(like)`` gave."""
    first, second = flat.view(2, *like.shape).unbind(0)
    return first, second


def empty_parcel(
    like: torch.Tensor, dtype: torch.dtype, loads: Sequence[Load], pool: Pool | None = None
) -> torch.Tensor:
    """Room for a parcel of ``loads`` from tensors [B, T, Hkv, D] such as ``like``, in the pool."""
    rows = sum((load.rows.stop - load.rows.start) * load.spans.rows for load in loads)
    elements = 2 * rows * like.shape[2] * like.shape[3]
    if pool is None or elements == 0:
        return like.new_empty(elements, dtype=dtype)
    return pool.take(like, dtype)[:elements]


def pack(pair: Pair, loads: Sequence[Load], pool: Pool | None = None) -> torch.Tensor:
    """Copy rows of ``pair`` into a parcel of the pool's memory: [elements], K before V.

    Where all rows travel and the pair lies in one piece already (``is_parcel``), that memory itself
    is the parcel.
    """
    whole = _whole(pair)
    if whole is not None and is_parcel(pair, loads):
        return whole
    parcel = empty_parcel(pair[0], pair[0].dtype, loads, pool)
    for part, block, spans in _blocks(parcel, pair, loads):
        if len(spans) < _MANY:
            for rows, inside in _copies(part, block, spans):
                inside.copy_(rows)
        else:
            torch.index_select(part, 1, spans.index(part.device), out=block)
    return parcel


def is_parcel(pair: Pair, loads: Sequence[Load]) -> bool:
    """Whether ``pair`` lies in memory as a parcel of ``loads`` does, so that none is made."""
    return is_complete(loads, pair[0].shape[1]) and _whole(pair) is not None


def unpack(parcel: torch.Tensor, room: Pair, loads: Sequence[Load]) -> Pair:
    """Return K and V with the parcel's rows in place; the other rows hold anything.

    Args:
        parcel: of ``loads``.
        room: written to, unless the parcel holds every row and is itself the answer.
        loads: what the sender packed.
    """
    if is_complete(loads, room[0].shape[1]):
        return as_pair(parcel, room[0])
    for part, block, spans in _blocks(parcel, room, loads):
        if len(spans) < _MANY:
            for rows, inside in _copies(part, block, spans):
                rows.copy_(inside)
        else:
            part.index_copy_(1, spans.index(part.device), block)
    return room


def add(parcel: torch.Tensor, total: Pair, loads: Sequence[Load]) -> None:
    """Add the parcel's rows to those of ``total``, in place."""
    for part, block, spans in _blocks(parcel, total, loads):
        if len(spans) < _MANY:
            for rows, inside in _copies(part, block, spans):
                rows.add_(inside)
        else:
            # No row is in the list twice, so the order of the sums is no question.
            part.index_add_(1, spans.index(part.device), block)


def is_complete(loads: Sequence[Load], length: int) -> bool:
    """Whether every one of ``length`` local rows travels."""
    return all(len(load.spans) == 1 and load.spans.rows == length for load in loads)


def _blocks(
    parcel: torch.Tensor, pair: Pair, loads: Sequence[Load]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Spans]]:
    """Of each tensor and load the rows of the batch, their block of the parcel, and the spans.

    Yields:
        [rows of the batch, T, Hkv, D]; [rows of the batch, rows of the spans, Hkv, D]; the spans.
    """
    at = 0
    for tensor in pair:
        for load in loads:
            part = tensor[load.rows]
            shape = (len(part), load.spans.rows, *part.shape[2:])
            size = math.prod(shape)
            yield part, parcel[at : at + size].view(shape), load.spans
            at += size


def _copies(
    part: torch.Tensor, block: torch.Tensor, spans: Spans
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each span of a part, and its place inside the block."""
    at = 0
    for start, stop in spans:
        yield part[:, start:stop], block[:, at : at + stop - start]
        at += stop - start


def _whole(pair: Pair) -> torch.Tensor | None:
    """The memory of both tensors as one, where the second follows the first without a gap."""
    first, second = pair
    apart = second.data_ptr() - first.data_ptr()
    if (
        first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and apart == first.numel() * first.element_size()
    ):
        return first.as_strided((2 * first.numel(),), (1,))
    return None
