"""Parcels: the rows of a rank's K and V, or of their gradients, that travel in one message.

B rows of the batch, T local tokens, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ringworld_model.ring.travel import Spans, count_rows


class Load(NamedTuple):
    """The local rows that neighbouring rows of the batch (equal plans) put into a parcel."""

    rows: slice
    spans: Spans


Pair = tuple[torch.Tensor, torch.Tensor]
"""K and V, or dK and dV: each [B, T, Hkv, D]."""


def empty_parcel(like: torch.Tensor, loads: Sequence[Load]) -> torch.Tensor:
    """Room for a parcel of ``loads`` from tensors [B, T, Hkv, D] such as ``like``."""
    rows = sum((load.rows.stop - load.rows.start) * count_rows(load.spans) for load in loads)
    return like.new_empty(2 * rows * like.shape[2] * like.shape[3])


def pack(pair: Pair, loads: Sequence[Load]) -> torch.Tensor:
    """Copy rows of ``pair`` into a new parcel: [elements], K before V.

    Where all rows travel and the pair lies in one piece already, that memory itself is the parcel.
    """
    whole = _whole(pair)
    if whole is not None and is_complete(loads, pair[0].shape[1]):
        return whole
    parcel = empty_parcel(pair[0], loads)
    for part, inside in _parts(parcel, pair, loads):
        inside.copy_(part)
    return parcel


def unpack(parcel: torch.Tensor, room: Pair, loads: Sequence[Load]) -> Pair:
    """Return K and V with the parcel's rows in place; the other rows hold anything.

    Args:
        parcel: of ``loads``.
        room: written to, unless the parcel holds every row and is itself the answer.
        loads: what the sender packed.
    """
    if is_complete(loads, room[0].shape[1]):
        first, second = parcel.view(2, *room[0].shape).unbind(0)
        return first, second
    for part, inside in _parts(parcel, room, loads):
        part.copy_(inside)
    return room


def add(parcel: torch.Tensor, total: Pair, loads: Sequence[Load]) -> None:
    """Add the parcel's rows to those of ``total``, in place."""
    for part, inside in _parts(parcel, total, loads):
        part.add_(inside)


def is_complete(loads: Sequence[Load], length: int) -> bool:
    """Whether every one of ``length`` local rows travels."""
    return all(load.spans == ((0, length),) for load in loads)


def _parts(
    parcel: torch.Tensor, pair: Pair, loads: Sequence[Load]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each span of the pair, and its place inside the parcel."""
    at = 0
    for tensor in pair:
        for load in loads:
            for start, stop in load.spans:
                part = tensor[load.rows, start:stop]
                yield part, parcel[at : at + part.numel()].view(part.shape)
                at += part.numel()


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
