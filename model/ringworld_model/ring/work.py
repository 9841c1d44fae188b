"""Work: what each rank of a ring must compute with each rank's keys, counted and cut up.

R ring size, D documents, P pieces (a piece is the part of one document inside one block).
``source`` is the rank whose keys and values are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ringworld_model.ring.layout import Layout
from ringworld_model.ring.rectangle import Rectangle, cover_staircase

# Rows that torch's CPU kernel takes at once (read): 256 from 768 rows on, else 64 or less.
_SMALL_TILE, _LARGE_TILE, _MANY_ROWS = 64, 256, 768
_DOCUMENTS_AT_ONCE = 1024


class Work(Protocol):
    """The visible part of the attention matrix of one row, by (rank, source)."""

    pairs: torch.Tensor
    """Visible (query, key) pairs: int64 [R, R], indexed (rank, source)."""
    wasted: torch.Tensor
    """Pairs that the kernel computes and masks away: int64 [R, R]."""
    calls: torch.Tensor
    """Kernel calls: int64 [R, R]; long staircases add a few."""

    def rectangles(self, rank: int, source: int) -> list[Rectangle]:
        """Rectangles that cover the visible pairs of (rank, source), each exactly once."""


def count_work(layout: Layout, document_lengths: Sequence[int]) -> Work:
    """Return the work of a row whose documents follow one another from index 0."""
    ends = torch.tensor(document_lengths, dtype=torch.int64).cumsum(0)
    starts = ends - torch.tensor(document_lengths, dtype=torch.int64)
    # One-token blocks would make a piece a token; stripes have a closed form instead.
    if layout.name == "striped":
        return _StripedWork(layout.ring_size, starts, ends)
    return _BlockWork(layout, starts, ends)


def _wasted(lengths: torch.Tensor) -> torch.Tensor:
    """Pairs above the diagonal that the tiles of a diagonal of ``lengths`` rows compute."""
    tile = torch.where(lengths < _MANY_ROWS, _SMALL_TILE, _LARGE_TILE)
    return lengths * torch.minimum(lengths, tile) // 2


class _BlockWork:
    """Layouts of long blocks. All follows from one table: tokens of each rank before a piece.

    Documents are packed from index 0 and a rank's tokens ascend, so the tokens that a rank holds
    before a piece are also the local index at which the piece begins for that rank.
    """

    def __init__(self, layout: Layout, starts: torch.Tensor, ends: torch.Tensor) -> None:
        total = int(ends[-1]) if len(ends) else 0
        blocks = torch.arange(0, total, layout.block_tokens)
        begins = torch.cat((blocks, starts)).unique(sorted=True)
        self._length = torch.diff(begins, append=torch.tensor([total]))[: len(begins)]
        self._owner = layout.owners()[begins // layout.block_tokens]
        self._document = torch.searchsorted(starts, begins, right=True) - 1
        held = torch.nn.functional.one_hot(self._owner, layout.ring_size) * self._length[:, None]
        before = torch.zeros(len(begins) + 1, layout.ring_size, dtype=torch.int64)
        torch.cumsum(held, 0, out=before[1:])
        first = torch.searchsorted(begins, torch.cat((starts, torch.tensor([total]))))
        self._before = before  # [P + 1, R]
        self._bounds = before[first]  # [D + 1, R]: local index where each document begins
        self.pairs, self.wasted, self.calls = self._count(layout.ring_size)

    def _count(self, ring_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = torch.arange(ring_size)
        table = torch.zeros(ring_size, ring_size, dtype=torch.int64)
        seen = self._before[:-1] - self._bounds[self._document]  # [P, R]
        pairs = table.index_add(0, self._owner, seen * self._length[:, None])
        triangle = self._length * (self._length + 1) // 2
        pairs[own, own] += torch.zeros(ring_size, dtype=torch.int64).index_add(
            0, self._owner, triangle
        )
        # A strip is a call unless it sees no key, or as many as the strip above it.
        order = torch.argsort(self._owner, stable=True)
        sees, owner, document = seen[order], self._owner[order], self._document[order]
        new = sees > 0
        if len(order) > 1:
            follows = (owner[1:] == owner[:-1]) & (document[1:] == document[:-1])
            new[1:] &= ~(follows[:, None] & (sees[1:] == sees[:-1]))
        calls = table.index_add(0, owner, new.to(torch.int64))
        lengths = torch.diff(self._bounds, dim=0)  # [D, R]
        calls[own, own] = (lengths > 0).sum(0)
        wasted = table.clone()
        wasted[own, own] = _wasted(lengths).sum(0)
        return pairs, wasted, calls

    def rectangles(self, rank: int, source: int) -> list[Rectangle]:
        if rank == source:
            # The same tokens on both sides: local order is row order, so a document is one square.
            bounds = self._bounds[:, rank].tolist()
            return [
                Rectangle(start, end, start, end, True)
                for start, end in zip(bounds[:-1], bounds[1:], strict=True)
                if start < end
            ]
        mine = (self._owner == rank).nonzero()[:, 0]
        q0s = self._before[mine, rank].tolist()
        q1s = (self._before[mine, rank] + self._length[mine]).tolist()
        k0s = self._bounds[self._document[mine], source].tolist()
        k1s = self._before[mine, source].tolist()
        found: list[Rectangle] = []
        strips: list[tuple[int, int, int]] = []
        document, first_key = -1, 0
        for q0, q1, k0, k1, now in zip(
            q0s, q1s, k0s, k1s, self._document[mine].tolist(), strict=True
        ):
            if now != document:
                found.extend(cover_staircase(strips, first_key))
                strips, document, first_key = [], now, k0
            if k1 == k0:
                continue
            if strips and strips[-1][2] == k1:
                strips[-1] = (strips[-1][0], q1, k1)
            else:
                strips.append((q0, q1, k1))
        found.extend(cover_staircase(strips, first_key))
        return found


class _StripedWork:
    """Token t on rank t mod R: each document is one diagonal for every (rank, source).

    Local query i and local key j are tokens i * R + rank and j * R + source, so the key is visible
    from i = j on where source <= rank, and from i = j + 1 on elsewhere.
    """

    def __init__(self, ring_size: int, starts: torch.Tensor, ends: torch.Tensor) -> None:
        self._ring_size = ring_size
        ranks = torch.arange(ring_size)
        # First local index at or past a token, by (document, rank).
        self._begin = (starts[:, None] - ranks + ring_size - 1) // ring_size
        self._end = (ends[:, None] - ranks + ring_size - 1) // ring_size
        later = (ranks[None, :] > ranks[:, None]).to(torch.int64)
        self.pairs = torch.zeros(ring_size, ring_size, dtype=torch.int64)
        self.wasted, self.calls = self.pairs.clone(), self.pairs.clone()
        for at in range(0, len(starts), _DOCUMENTS_AT_ONCE):
            some = slice(at, at + _DOCUMENTS_AT_ONCE)
            rows = (self._end[some, :, None] - self._begin[some, None, :] - later).clamp(min=0)
            self.pairs += (rows * (rows + 1) // 2).sum(0)
            self.wasted += _wasted(rows).sum(0)
            self.calls += (rows > 0).sum(0)

    def rectangles(self, rank: int, source: int) -> list[Rectangle]:
        later = int(source > rank)
        keys = self._begin[:, source].tolist()
        ends = self._end[:, rank].tolist()
        return [
            Rectangle(key + later, end, key, end - later, True)
            for key, end in zip(keys, ends, strict=True)
            if end - later > key
        ]
