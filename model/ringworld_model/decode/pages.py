"""One row's keys and values on one rank: pages that are never moved, and may be shared.

Hkv key heads, D head width; a slot is the place of one token on this rank (see ``deal``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ringworld_model.decode.deal import Deal

MOST_SPARE_SLOTS = 1024
"""Slots of a page beyond what its row needs at the moment, at most."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a token takes.

    Attributes:
        layers: of the model.
        kv_heads: Hkv.
        head_dim: D.
        dtype: of keys and values.
        device: where they lie.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class Piece(NamedTuple):
    """Keys and values of neighbouring slots, within one page."""

    memory: Tensor
    """[layers, 2, Hkv, slots, D]; keys, then values."""
    start: int
    stop: int


class _Page(NamedTuple):
    """Room for the row's tokens [begin, reach), of which this rank keeps some, or none."""

    begin: int
    reach: int
    first: int
    memory: Tensor

    @property
    def stop(self) -> int:
        return self.first + self.memory.shape[3]


class RowCache:
    """This rank's share of one row's keys and values, in all layers.

    Attributes:
        first: rank of the row's first block.
        length: tokens of the row, on all ranks together.
        most: tokens that it may ever have.
    """

    def __init__(self, shape: CacheShape, deal: Deal, rank: int, first: int, most: int) -> None:
        """Hold nothing yet."""
        self.first, self.length, self.most = first, 0, most
        self._shape, self._deal, self._rank = shape, deal, rank
        self._pages: list[_Page] = []
        self._shared = 0  # tokens that other rows read, too

    def held(self, length: int) -> int:
        """This rank's slots of the row's first ``length`` tokens."""
        return self._deal.held(length, self._rank, self.first)

    def reserve(self, length: int) -> None:
        """Make room for the row's first ``length`` tokens.

        The pages that are there stay where they are, so growing copies nothing. A new page has room
        for as many tokens again as the row has of its own, up to ``MOST_SPARE_SLOTS`` a rank: few
        pages, since each is a kernel call. All ranks make theirs for the same tokens.

        Args:
            length: tokens of the row.
        """
        begin, first = (self._pages[-1].reach, self._pages[-1].stop) if self._pages else (0, 0)
        if length <= begin:
            return
        spare = min(length - self._shared, MOST_SPARE_SLOTS * self._deal.ring_size)
        reach = max(length, min(length + spare, self.most))
        shape = self._shape
        memory = torch.empty(
            (shape.layers, 2, shape.kv_heads, self.held(reach) - first, shape.head_dim),
            dtype=shape.dtype,
            device=shape.device,
        )
        self._pages.append(_Page(begin, reach, first, memory))

    def write(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Keep tokens from ``slot`` on; ``reserve`` has made room.

        Args:
            layer: of the model.
            slot: first of them.
            k: [n, Hkv, D].
            v: [n, Hkv, D].
        """
        done = 0
        for memory, start, stop in self.pieces(slot, slot + len(k)):
            part = slice(done, done + stop - start)
            memory[layer, 0, :, start:stop] = k[part].transpose(0, 1)
            memory[layer, 1, :, start:stop] = v[part].transpose(0, 1)
            done = part.stop

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The pages' parts that hold slots [start, stop), in order."""
        for _, _, first, memory in self._pages:
            begin, end = max(start - first, 0), min(stop - first, memory.shape[3])
            if begin < end:
                yield Piece(memory, begin, end)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; copies nothing, frees whole pages."""
        if length < self._shared:
            # Others read what lies behind: what comes next goes to a page of this row's own.
            self._pages, self._shared = self._cut(length), length
        self._pages = [page for page in self._pages if page.begin < length]
        self.length = length

    def fork(self) -> RowCache:
        """A second row that begins with this one's tokens, in the same memory."""
        child = RowCache(self._shape, self._deal, self._rank, self.first, self.most)
        child._pages, child.length = self._cut(self.length), self.length
        child._shared = self._shared = self.length
        return child

    def storages(self) -> Iterator[tuple[int, int]]:
        """(address, bytes) of the memory that the row keeps alive, shared or not."""
        for page in self._pages:
            storage = page.memory.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()

    def _cut(self, length: int) -> list[_Page]:
        """The pages of the first ``length`` tokens, the last of them ended there."""
        pages = [page for page in self._pages if page.begin < length]
        if pages and pages[-1].reach > length:
            begin, _, first, memory = pages[-1]
            slots = self.held(length) - first
            pages[-1] = _Page(begin, length, first, memory[:, :, :, :slots])
        return pages
