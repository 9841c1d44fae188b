"""Tile tables: which tiles of the attention matrix a kernel visits at one ring step.

Both sides are in local indices: a rank's queries against the keys of the rank that the step is
about. A rank's tokens ascend in row index and documents follow one another, so the keys that a
query sees are one range, and so are the queries that a key is seen by. Hence a tile whose tokens
are all of one document needs no mask within one range of tiles of the other side; only tiles at
that range's ends are masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ringworld_model.ring.plan import RingPlan
from ringworld_model.ring.upload import upload

_CPU = torch.device("cpu")

VISIT_FIELDS = 8
"""Columns of ``TileTable.visits``."""


class TileTable(NamedTuple):
    """The tiles that one side's tiles visit on the other side.

    Attributes:
        visits: int32 [N, 8], one row for each tile of this side that visits any, heaviest first:
            the tile; [begin, end) of the other side's tiles that are wholly visible; [low, high) of
            the other side's tokens that may be read in masked tiles; and places in ``masked``:
            begin, where tiles that mix documents begin, end.
        masked: int32, tiles of the other side of which some pairs are hidden.
        ranges: int32 [2, T], begin and end of the other side's tokens that each token of this side
            sees, or is seen by; equal where there are none.
        tile: tokens of a tile of this side.
        other: tokens of a tile of the other side.
    """

    visits: torch.Tensor
    masked: torch.Tensor
    ranges: torch.Tensor
    tile: int
    other: int

    @property
    def area(self) -> int:
        """Pairs of all visited tiles, hidden ones included."""
        full = self.visits[:, 2] - self.visits[:, 1]
        return (int(full.sum()) + len(self.masked)) * self.tile * self.other


class _Pieces(NamedTuple):
    """Parts of one side that lie in one tile and one document each, int64 [P]."""

    start: torch.Tensor
    stop: torch.Tensor
    document: torch.Tensor


def query_table(
    plan: RingPlan, rank: int, step: int, shape: tuple[int, int], device: torch.device
) -> TileTable:
    """Return for each tile of ``rank``'s queries the tiles of keys that it visits.

    Made when first asked for. At step 0 every tile has a row, also those of padding alone.

    Args:
        plan: of the row.
        rank: the queries' place in the ring.
        step: ring step.
        shape: tokens of a tile of queries and of a tile of keys.
        device: where the table shall lie.
    """
    key = ("queries", rank, step, shape, device)
    if key not in plan.cache:
        queries = _place_index(plan, rank)
        keys = _place_index(plan, (rank - step) % plan.ring_size)
        starts, ends = _documents(plan)
        pieces = _cut(queries, starts, ends, shape[0])
        low = torch.searchsorted(keys, starts[pieces.document])
        all_see = torch.searchsorted(keys, queries[pieces.start], right=True)
        high = torch.searchsorted(keys, queries[pieces.stop - 1], right=True)
        every = -(-len(queries) // shape[0]) if step == 0 else 0
        visible = torch.stack((low, high, low, all_see))
        ranges = _query_ranges(plan, rank, step, device)
        plan.cache[key] = _build(pieces, visible, shape, len(keys), every, ranges)
    table: TileTable = plan.cache[key]
    return table


def key_table(
    plan: RingPlan, rank: int, step: int, shape: tuple[int, int], device: torch.device
) -> TileTable:
    """Return for each tile of keys the tiles of ``rank``'s queries that it visits.

    Made when first asked for.

    Args:
        plan: of the row.
        rank: the queries' place in the ring.
        step: ring step.
        shape: tokens of a tile of keys and of a tile of queries.
        device: where the table shall lie.
    """
    key = ("keys", rank, step, shape, device)
    if key not in plan.cache:
        queries = _place_index(plan, rank)
        keys = _place_index(plan, (rank - step) % plan.ring_size)
        starts, ends = _documents(plan)
        pieces = _cut(keys, starts, ends, shape[0])
        low = torch.searchsorted(queries, keys[pieces.start])
        see_all = torch.searchsorted(queries, keys[pieces.stop - 1])
        high = torch.searchsorted(queries, ends[pieces.document])
        visible = torch.stack((low, high, see_all, high))
        ranges = _key_ranges(plan, rank, step, device)
        plan.cache[key] = _build(pieces, visible, shape, len(queries), 0, ranges)
    table: TileTable = plan.cache[key]
    return table


def _query_ranges(plan: RingPlan, rank: int, step: int, device: torch.device) -> torch.Tensor:
    """``TileTable.ranges`` of a rank's queries. Tables of all tile shapes share them."""
    key = ("query ranges", rank, step, device)
    if key not in plan.cache:
        queries = _place_index(plan, rank, device)
        keys = _place_index(plan, (rank - step) % plan.ring_size, device)
        starts, ends = _documents(plan, device)
        document = torch.searchsorted(ends, queries, right=True)
        real = document < len(ends)
        begin = torch.searchsorted(keys, torch.nn.functional.pad(starts, (0, 1))[document])
        end = torch.searchsorted(keys, queries, right=True)
        plan.cache[key] = torch.where(real, torch.stack((begin, end)), 0).to(torch.int32)
    ranges: torch.Tensor = plan.cache[key]
    return ranges


def _key_ranges(plan: RingPlan, rank: int, step: int, device: torch.device) -> torch.Tensor:
    """``TileTable.ranges`` of the keys at hand."""
    key = ("key ranges", rank, step, device)
    if key not in plan.cache:
        queries = _place_index(plan, rank, device)
        keys = _place_index(plan, (rank - step) % plan.ring_size, device)
        _, ends = _documents(plan, device)
        document = torch.searchsorted(ends, keys, right=True)
        real = document < len(ends)
        begin = torch.searchsorted(queries, keys)
        end = torch.searchsorted(queries, torch.nn.functional.pad(ends, (0, 1))[document])
        plan.cache[key] = torch.where(real, torch.stack((begin, end)), 0).to(torch.int32)
    ranges: torch.Tensor = plan.cache[key]
    return ranges


def _place_index(plan: RingPlan, place: int, device: torch.device = _CPU) -> torch.Tensor:
    """Row index of each token of a ring place: int64 [ring_length], ascending."""
    key = ("index", place, device)
    if key not in plan.cache:
        ranks = range(place * plan.heads_size, (place + 1) * plan.heads_size)
        index = torch.cat([plan.local_indices(rank) for rank in ranks])
        plan.cache[key] = upload(index, device)
    found: torch.Tensor = plan.cache[key]
    return found


def _documents(plan: RingPlan, device: torch.device = _CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """Row index where each document begins, and one past where it ends."""
    key = ("documents", device)
    if key not in plan.cache:
        lengths = torch.tensor(plan.document_lengths, dtype=torch.int64)
        ends = lengths.cumsum(0)
        plan.cache[key] = upload(torch.stack((ends - lengths, ends)), device).unbind(0)
    found: tuple[torch.Tensor, torch.Tensor] = plan.cache[key]
    return found


def _cut(index: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, tile: int) -> _Pieces:
    real = torch.searchsorted(index, ends[-1:]) if len(ends) else torch.zeros(1, dtype=torch.int64)
    bounds = torch.searchsorted(index, starts)
    cuts = torch.cat((torch.arange(0, int(real), tile), bounds[bounds < real])).unique()
    document = torch.searchsorted(starts, index[cuts], right=True) - 1
    return _Pieces(cuts, torch.cat((cuts[1:], real))[: len(cuts)], document)


def _build(
    pieces: _Pieces,
    visible: torch.Tensor,
    shape: tuple[int, int],
    length: int,
    every: int,
    ranges: torch.Tensor,
) -> TileTable:
    """Put pieces together to tiles.

    Args:
        pieces: of this side.
        visible: int64 [4, P]: low and high of the other side's tokens that some token of the piece
            sees, or is seen by; and the same for every token of the piece.
        shape: tokens of a tile of this side and of the other.
        length: tokens of the other side.
        every: tiles of this side that get a row even if they visit none; 0 for none.
        ranges: see ``TileTable``; they lie where the table shall lie.
    """
    tile, other = shape
    low, high, full_low, full_high = visible
    own = pieces.start // tile
    tiles, count = own.unique_consecutive(return_counts=True)
    lead = count.cumsum(0) - count  # The first piece of each tile.
    some = high > low
    begin = torch.where(some, low // other, 0)
    end = torch.where(some, (high + other - 1) // other, 0)
    full_begin, full_end = (full_low + other - 1) // other, full_high // other
    whole = some & (pieces.stop - pieces.start == tile) & (full_end > full_begin)
    full_begin, full_end = torch.where(whole, full_begin, end), torch.where(whole, full_end, end)

    # Masked tiles: on either side of the full ones; tiles that mix documents name some twice.
    starts = torch.stack((begin, full_end), 1).flatten()
    counts = torch.stack((full_begin - begin, end - full_end), 1).flatten()
    skipped = counts.cumsum(0) - counts
    at = torch.arange(int(counts.sum())) + (starts - skipped).repeat_interleave(counts)
    per_row = -(-length // other) + 1
    pairs = (own.repeat_interleave(2).repeat_interleave(counts) * per_row + at).unique()
    first = torch.searchsorted(pairs, tiles * per_row)
    last = torch.searchsorted(pairs, (tiles + 1) * per_row)

    mixed = count > 1
    rows = torch.stack(
        (
            tiles,
            full_begin[lead],
            full_end[lead],
            torch.where(mixed, 0, low[lead]),
            torch.where(mixed, length, high[lead]),
            first,
            torch.where(mixed, first, last),
            last,
        ),
        1,
    )
    # A masked tile takes about one and a half times as long as a full one.
    weight = 2 * (rows[:, 2] - rows[:, 1]) + 3 * (last - first)
    if every:
        padding = torch.ones(every, dtype=torch.bool).index_fill_(0, tiles, False).nonzero()
        rows = torch.cat((rows, torch.nn.functional.pad(padding, (0, VISIT_FIELDS - 1))))
        weight = torch.cat((weight, weight.new_zeros(len(padding))))
    else:
        rows, weight = rows[weight > 0], weight[weight > 0]
    visits = rows[weight.argsort(descending=True, stable=True)].to(torch.int32)
    masked = (pairs % per_row).to(torch.int32)
    device = ranges.device
    return TileTable(upload(visits, device), upload(masked, device), ranges, tile, other)
