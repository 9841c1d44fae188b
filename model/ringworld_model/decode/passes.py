"""Attention of a pass over a cache that is spread around the ring, layer by layer.

T tokens of this rank, H query heads, Hkv key heads, D head width, R ring size.

Three ways, all exact (partial attention over disjoint keys is merged by lse):

- ``copied``: every rank computes every token of the pass, attends over its own slots, and one
  all-gather of (out, lse) a layer gives each rank all parts. They are merged in the order of the
  ranks, so that all ranks go on with the same bits, which an all-reduce does not promise. For
  decode steps and short prompts: one message of latency.
- ``queries``: a rank computes the tokens that it keeps. Its queries visit the others around the
  ring, and what they found there is sent home, while the next ones are computed. The bytes grow
  with the pass, not with the cache.
- ``keys``: the same, but keys and values visit, as in training. Cheaper while the cache is short or
  key heads are few; the bytes grow with the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ringworld_model.decode.deal import Deal
from ringworld_model.decode.kernel import Partial
from ringworld_model.decode.pages import CacheShape, Piece
from ringworld_model.decode.visible import (
    Call,
    Queries,
    Segment,
    count_queries,
    list_calls,
    list_queries,
    rectangles,
)
from ringworld_model.ring.comm import Exchange, Message, Parcel, Ring, RingStats
from ringworld_model.ring.kernel import accumulator

Way = Literal["copied", "queries", "keys"]


def choose_way(shape: CacheShape, heads: int, deal: Deal, segments: Sequence[Segment]) -> Way:
    """The way that sends the least; the same on every rank.

    A pass of no more than a block would lie on one rank: there ``copied`` computes no more.

    Args:
        shape: of the cache.
        heads: H.
        deal: who keeps what.
        segments: of the pass.
    """
    tokens = sum(stop - start for _, start, stop in segments)
    if deal.ring_size == 1 or tokens <= deal.block:
        return "copied"
    size, exact = shape.dtype.itemsize, accumulator(shape.dtype).itemsize
    visiting = tokens * heads * (shape.head_dim * (size + exact) + exact)
    keys = sum(stop for _, _, stop in segments) * 2 * shape.kv_heads * shape.head_dim * size
    return "keys" if keys < visiting else "queries"


@dataclass
class CachePass:
    """One pass: writes its tokens' keys and values, and attends to all that its tokens see.

    A collective: every rank makes it with the same segments and calls its layers in order.

    Attributes:
        ring: this rank's place.
        deal: who keeps what.
        shape: of the cache.
        segments: the new tokens; their rows have room for them.
        way: see the module.
        stats: adds up where the time goes.
    """

    ring: Ring
    deal: Deal
    shape: CacheShape
    segments: Sequence[Segment]
    way: Way
    stats: RingStats

    def __post_init__(self) -> None:
        """List this rank's queries, and the kernel calls, which are the same in each layer."""
        rank = self.ring.rank
        self.queries = self._queries_of(None if self.way == "copied" else rank)
        self._kept = [each for each in self.queries if each.owner == rank]
        self._own = self._calls(self.queries, rank)
        self._counts = [count_queries(self._queries_of(each)) for each in range(self.ring.size)]
        others = [(rank - step) % self.ring.size for step in range(1, self.ring.size)]
        self._visits: list[list[Call]] = []
        if self.way == "queries":
            self._visits = [self._calls(self._queries_of(other), rank) for other in others]
        elif self.way == "keys":
            self._visits = [self._visiting_calls(other) for other in others]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer, see ``transformer.Attend``.

        Args:
            layer: of the model.
            q: [1, T, H, D], in the order of ``queries``.
            k: [1, T, Hkv, D].
            v: [1, T, Hkv, D].

        Returns:
            [1, T, H, D], q's dtype.
        """
        for segment, at, start, stop, _ in self._kept:
            part, row = slice(at, at + stop - start), self.segments[segment].row
            row.write(layer, row.held(start), k[0, part], v[0, part])
        turned = q.transpose(1, 2)
        if self.way == "queries":
            found = self._visit_with_queries(layer, turned)
        elif self.way == "keys":
            found = self._visit_with_keys(layer, turned)
        else:
            found = self._merge_copies(layer, turned)
        return found.out.transpose(1, 2).to(q.dtype)

    def _merge_copies(self, layer: int, q: Tensor) -> Partial:
        found = self._compute(self._own, layer, q)
        if self.ring.size == 1:
            return found
        mine = torch.cat([found.out, found.lse.unsqueeze(-1)], dim=-1)
        parts = mine.new_empty((self.ring.size, *mine.shape[1:]))
        with self.stats.waiting(q.device):
            dist.all_gather_single(parts, mine, group=self.ring.group)
        self.stats.bytes_sent += mine.nbytes * (self.ring.size - 1)
        whole = self._nothing(q)
        with self.stats.computing(q.device):
            for part in parts:
                whole.merge(part[None, ..., :-1], part[None, ..., -1])
        return whole

    def _visit_with_queries(self, layer: int, q: Tensor) -> Partial:
        rank, size = self.ring.rank, self.ring.size
        exchange = Exchange(self.ring, self.stats)
        heads, width = q.shape[1], q.shape[3]
        visiting, found = q.contiguous(), self._nothing(q)
        homeward: Tensor | None = None
        home = found.out.new_empty((*q.shape[:3], width + 1))
        for step in range(size + 1):
            sends, receives = [], []
            coming = visiting
            if step < size - 1:
                tokens = self._counts[(rank - step - 1) % size]
                coming = q.new_empty((1, heads, tokens, width))
                sends.append(Parcel(Message.KEYS_VALUES, visiting, rank + 1))
                receives.append(Parcel(Message.KEYS_VALUES, coming, rank - 1))
            if homeward is not None:
                sends.append(Parcel(Message.HOME, homeward, rank - step + 1))
                receives.append(Parcel(Message.HOME, home, rank + step - 1))
            exchange.post(sends, receives)
            part = None
            if step < size:
                calls = self._visits[step - 1] if step else self._own
                part = self._compute(calls, layer, visiting)
            exchange.finish()
            if homeward is not None:
                found.merge(home[..., :-1], home[..., -1])
            homeward = None
            if part is not None and step == 0:
                found = part
            elif part is not None:
                homeward = torch.cat([part.out, part.lse.unsqueeze(-1)], dim=-1)
            visiting = coming
        return found

    def _visit_with_keys(self, layer: int, q: Tensor) -> Partial:
        rank, size = self.ring.rank, self.ring.size
        exchange = Exchange(self.ring, self.stats)
        visiting = self._packed(layer)
        found = self._nothing(q)
        for step in range(size):
            sends, receives = [], []
            coming = visiting
            if step < size - 1:
                slots = sum(self._slots_of((rank - step - 1) % size))
                coming = visiting.new_empty((*visiting.shape[:2], slots, visiting.shape[3]))
                sends.append(Parcel(Message.KEYS_VALUES, visiting, rank + 1))
                receives.append(Parcel(Message.KEYS_VALUES, coming, rank - 1))
            exchange.post(sends, receives)
            with self.stats.computing(q.device):
                if step == 0:
                    self._add(found, self._own, q, layer)
                else:
                    self._add(found, self._visits[step - 1], q, None, visiting)
            exchange.finish()
            visiting = coming
        return found

    def _compute(self, calls: Sequence[Call], layer: int, q: Tensor) -> Partial:
        with self.stats.computing(q.device):
            found = self._nothing(q)
            self._add(found, calls, q, layer)
        return found

    def _add(
        self,
        found: Partial,
        calls: Sequence[Call],
        q: Tensor,
        layer: int | None,
        visitor: Tensor | None = None,
    ) -> None:
        """Make the calls: in the cache's ``layer``, or in ``visitor`` [2, Hkv, slots, D]."""
        scale = self.shape.head_dim**-0.5
        for at, (memory, start, stop), diagonal in calls:
            whole = memory[layer] if visitor is None else visitor
            k, v = whole[:, None, :, start:stop]
            part = q[:, :, at] if isinstance(at, slice) else q.index_select(2, at)
            found.attend(part, k, v, at, diagonal, scale)

    def _nothing(self, q: Tensor) -> Partial:
        return Partial(q.shape[1], q.shape[2], q.shape[3], q)

    def _queries_of(self, rank: int | None) -> list[Queries]:
        return list_queries(self.deal, self.segments, rank)

    def _calls(self, queries: Sequence[Queries], rank: int) -> list[Call]:
        """Calls of queries over this rank's own pages."""

        def pieces(segment: int, start: int, stop: int) -> Iterator[Piece]:
            return self.segments[segment].row.pieces(start, stop)

        found = rectangles(self.deal, self.segments, queries, rank)
        return list_calls(found, pieces, self.shape.device)

    def _visiting_calls(self, key_rank: int) -> list[Call]:
        """Calls of this rank's queries over keys that come packed, one segment after another."""
        bases = [0]
        for slots in self._slots_of(key_rank):
            bases.append(bases[-1] + slots)
        room = torch.empty(1, 1, 1, bases[-1], device="meta")

        def pieces(segment: int, start: int, stop: int) -> list[Piece]:
            return [Piece(room, bases[segment] + start, bases[segment] + stop)]

        found = rectangles(self.deal, self.segments, self.queries, key_rank)
        return list_calls(found, pieces, self.shape.device)

    def _slots_of(self, rank: int) -> list[int]:
        """Slots of each segment's row that a rank holds, the pass's own included."""
        return [self.deal.held(stop, rank, row.first) for row, _, stop in self.segments]

    def _packed(self, layer: int) -> Tensor:
        """This rank's keys and values of the pass's rows: [2, Hkv, slots, D]."""
        parts = [
            memory[layer, :, :, start:stop]
            for (row, _, _), slots in zip(
                self.segments, self._slots_of(self.ring.rank), strict=True
            )
            for memory, start, stop in row.pieces(0, slots)
        ]
        if not parts:
            shape = self.shape
            return torch.empty(
                (2, shape.kv_heads, 0, shape.head_dim), dtype=shape.dtype, device=shape.device
            )
        return torch.cat(parts, dim=2)
