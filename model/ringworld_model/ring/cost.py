"""Cost: what "auto" counts to compare layouts, for each way that a backend computes a ring step.

Costs are in visible pairs of one head, and add up along the ring: no rank gets more than a step
ahead of its neighbours. R ring size, D documents, P pieces of documents; tables are int64 [R, R] by
(rank, source).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ringworld_model.ring.block_cpu import DIAGONAL_ROWS, KEYS_STEP
from ringworld_model.ring.dealt_work import DocumentZigzagWork, StripedWork
from ringworld_model.ring.rectangle import count_layers
from ringworld_model.ring.work import BlockWork, Pieces, Work, group_runs

# A call of the CPU kernel (forward, backward, merging) takes about as long as 6,300 pairs (fitted
# to rows of 4Ki to 16Ki tokens in every layout: off by 7 % on average), and a row of keys from
# another rank as long as 64 pairs: it is packed, sent, unpacked, twice, and its gradient, in fp32,
# goes back (fitted to whole calls). On a GPU rows travel meanwhile; launching a call and merging it
# takes some 10 us (derived), in which it computes a 512 x 512 tile of 32 heads of 128.
_PAIRS_PER_CALL = 6144
_PAIRS_PER_ROW = 64
_PAIRS_PER_VARLEN_CALL = 512 * 512
# A token of padding that the layout adds passes through all the other layers too.
_PAIRS_PER_TOKEN = 4096
_TILE_BITS = 7
_TILE = 1 << _TILE_BITS


def count_cost(work: Work, backend: str) -> int:
    """Return what a row costs: when its last rank is done, and its padding.

    Args:
        work: of the row.
        backend: one of ``BACKENDS``.
    """
    return _last_done(_COUNTS[backend](work)) + _padding(work)


def _last_done(costs: torch.Tensor) -> int:
    """When the last rank is done, of what each (rank, source) costs: int64 [R, R]."""
    # Integers, so that every machine agrees on the least.
    costs = by_step(costs)
    # The keys of a step leave when the rank before begins the step before, and this rank's own go
    # on likewise; so neighbours are at most one step apart.
    begins = torch.zeros_like(costs[0])
    for cost in costs.unbind(1):
        # Each with its neighbours on both sides.
        around = torch.cat((begins[-1:], begins, begins[:1])).unfold(0, 3, 1)
        begins = torch.maximum(begins + cost, around.amax(1))
    return int(begins.max())


def bound_cost(work: Work, backend: str) -> int:
    """Return at most what ``count_cost`` is. Cheap: of visible pairs, for tiles a little more."""
    if backend == "triton" and isinstance(work, DocumentZigzagWork):
        return _last_done(_fewest_tiles(work) * _TILE**2) + _padding(work)
    return int(work.pairs.sum(1).max()) + _padding(work)


DEALT = ("document_zigzag", "striped")
"""Layouts that deal every document to all ranks, see ``bound_dealt``."""


def bound_dealt(
    name: str, document_lengths: Sequence[int], context_length: int, ring_size: int, backend: str
) -> int:
    """Return at most what ``count_cost`` of a layout in ``DEALT`` is, without making it.

    Counting what thousands of short documents cost there takes longer than all else, for nothing.
    """
    length = torch.tensor(document_lengths, dtype=torch.int64)
    some = ring_size * (ring_size + 1) // 2
    few = length * (length + 1) // 2
    if backend == "triton":
        # (query, tile) of each source where the query sees a key: each is a row of a tile.
        if name == "striped":
            # A query sees as many keys of each source, but for one more or less.
            keys = length // ring_size
            rest = ring_size * (ring_size - 1) // 2 + ring_size**2 * _tiles_upto(keys - 1)
            rest += ring_size * (length - keys * ring_size + 1) * _tiles_of_keys(keys)
        else:
            # A rank's far queries see both chunks of later ranks, all its queries the near chunk of
            # earlier ones.
            chunk = length // (2 * ring_size)
            others = _tiles_of_keys(2 * chunk) + 2 * _tiles_of_keys(chunk)
            rest = ring_size * (ring_size - 1) // 2 * chunk * others
            rest = (rest + ring_size * _tiles_upto(2 * chunk)).clamp(min=some)
        work = _TILE * torch.where(length <= ring_size, few, rest)
    else:
        # (rank, source) where the document is a rectangle.
        met = torch.where(length < 2 * ring_size, some, ring_size**2)
        met = torch.where(length <= ring_size, few, met)
        work = met * _TILE**2 if backend == "flash" else few + met * _PAIRS_PER_CALL
    padding = -(-context_length // ring_size) - sum(document_lengths) // ring_size
    return int(torch.maximum(work, few).sum()) // ring_size + _PAIRS_PER_TOKEN * padding


def _tiles_of_keys(keys: torch.Tensor) -> torch.Tensor:
    """Tiles that so many keys take at least."""
    return (keys + _TILE - 1) >> _TILE_BITS


def _tiles_upto(keys: torch.Tensor) -> torch.Tensor:
    """The sum of ``_tiles_of_keys`` of 1, 2 and so on up to ``keys``, from 0."""
    whole = keys >> _TILE_BITS
    return (_TILE * whole * (whole + 1) >> 1) + (keys - whole * _TILE) * (whole + 1)


def by_step(table: torch.Tensor) -> torch.Tensor:
    """[R, R] by (rank, source) -> by (rank, step)."""
    ranks = torch.arange(len(table))
    return table.gather(1, (ranks[:, None] - ranks[None, :]) % len(table))


def _padding(work: Work) -> int:
    real = int(work.ends[-1]) if len(work.ends) else 0
    return _PAIRS_PER_TOKEN * (work.layout.length - real // work.layout.ring_size)


def _count_calls(work: Work) -> torch.Tensor:
    """Rectangles one by one: pairs, what diagonals compute in vain, calls, and rows.

    Only rows that the rank itself needs: those for ranks further on pass through untouched.
    """
    cost = work.pairs.clone()
    if isinstance(work, StripedWork):
        for rows in work.diagonals():
            # A table of every number of rows is shorter than that of all diagonals.
            beside = _beside_pairs(torch.arange(int(rows.max()) + 1 if rows.numel() else 0))
            cost += beside[rows].sum(0)
            came = rows.sum(0).mul_(_PAIRS_PER_ROW)
            cost += came.fill_diagonal_(0)
        return cost
    if isinstance(work, DocumentZigzagWork):
        beside = _beside_pairs(work.shares).sum(0)
        each = work.sum_products(_some, lambda keys: _PAIRS_PER_ROW * keys + _PAIRS_PER_CALL)
        return cost.add_(each).add_(beside.diag())
    pieces, seen = work.later_pieces()
    calls = _strips(pieces, seen).to(torch.int64)
    cost.index_add_(0, pieces.owner, calls, alpha=_PAIRS_PER_CALL)
    # The last piece of a document on a rank sees all that the rank needs of it.
    first, _ = group_runs(pieces.owner, pieces.document, len(work.starts))
    last = torch.cat((first[1:], first.new_tensor([len(pieces.owner)])))[: len(first)] - 1
    came = torch.zeros_like(cost).index_add_(0, pieces.owner[last], seen[last])
    cost += came.mul_(_PAIRS_PER_ROW).fill_diagonal_(0)
    owner, rows = work.squares()
    cost.diagonal().index_add_(0, owner, _beside_pairs(rows))
    return cost


def _count_varlen_calls(work: Work) -> torch.Tensor:
    """Calls of many rectangles that share no row: tiles that begin anew in each, and calls."""
    area = torch.zeros_like(work.pairs)
    calls = area.clone()
    if isinstance(work, StripedWork):
        for rows in work.diagonals():
            area += _triangle(rows).sum(0)
            calls |= (rows > 0).any(0)
        return area + _PAIRS_PER_VARLEN_CALL * calls
    if isinstance(work, DocumentZigzagWork):
        area = work.sum_products(_sides, _sides) + _triangle(work.shares).sum(0).diag()
        return area + _PAIRS_PER_VARLEN_CALL * (area > 0)
    pieces, seen = work.later_pieces()
    area.index_add_(0, pieces.owner, _sides(seen) * _sides(pieces.length)[:, None])
    # The document of most calls decides, for documents share no row.
    first, of = group_runs(pieces.owner, pieces.document, len(work.starts))
    strips = area.new_zeros(len(first), len(area))
    strips.index_add_(0, of, _strips(pieces, seen).to(torch.int64))
    owner = pieces.owner[first][:, None].expand_as(strips)
    calls.scatter_reduce_(0, owner, count_layers(strips), "amax")
    owner, rows = work.squares()
    area.diagonal()[:] = area.new_zeros(len(area)).index_add_(0, owner, _triangle(rows))
    calls.diagonal()[:] = owner.bincount(minlength=len(area)).clamp(max=1)
    return area + _PAIRS_PER_VARLEN_CALL * calls


def _count_tiles(work: Work) -> torch.Tensor:
    """One launch a step: the area of the tiles in which some pair is visible."""
    if isinstance(work, DocumentZigzagWork):
        return torch.stack([_tiles_of(work, rank) for rank in range(len(work.pairs))]) * _TILE**2
    layout, size = work.layout, work.layout.ring_size
    every = torch.arange(size)
    held = layout.tokens_before(work.ends[-1:], every) if len(work.ends) else every * 0
    # Cut each rank's queries where a tile or a document begins; ranks follow one another.
    room = -(-layout.length // _TILE) * _TILE
    tiles = torch.arange(0, room, _TILE)[:, None]
    tiles = (tiles + every * room)[tiles < held]
    begins = torch.cat((tiles, _first_tokens(work, room))).unique()
    rank, row = begins // room, begins // _TILE
    local = begins - rank * room
    stop = torch.minimum(held[rank], (local // _TILE + 1) * _TILE)
    stop[:-1] = torch.where(row[1:] == row[:-1], local[1:], stop[:-1])
    document = torch.searchsorted(work.ends, layout.row_index(local, rank), right=True)
    # What the last query of a cut sees is what any of it sees.
    upto = layout.row_index(stop - 1, rank) + 1
    start = work.starts[document]
    own = _visits(row, layout.tokens_before(start, rank), stop)
    # Documents inside one block are seen by nobody else.
    block = layout.block_tokens
    far = (start // block < (work.ends[document] - 1) // block).nonzero()[:, 0]
    low = layout.tokens_before(start[far, None], every)
    visits = _visits(row[far], low, layout.tokens_before(upto[far, None], every))
    tiles = torch.zeros_like(work.pairs).index_add_(0, rank[far], visits)
    tiles.diagonal()[:] = held.new_zeros(size).index_add(0, rank, own)
    return tiles * _TILE**2


def _tiles_of(work: DocumentZigzagWork, rank: int) -> torch.Tensor:
    """Tiles that a rank's rectangles visit, by source: int64 [R]."""
    (q0, q1, k0, k1), some = work.sides(rank)
    room = (work.layout.length >> _TILE_BITS) + 1
    top, left, bottom, right = (each >> _TILE_BITS for each in (q0, k0, q1 - 1, k1 - 1))
    rows, columns = bottom - top + 1, right - left + 1
    visits = rows * columns
    visits[rank] = (rows * (rows + 1) // 2)[rank]
    visits *= some
    # Documents follow one another on both sides: a rectangle's first tile may be the last one of
    # the rectangle before it.
    reached = torch.where(some, bottom * room + right, -1).cummax(1).values
    again = some[:, 1:] & (reached[:, :-1] == (top * room + left)[:, 1:])
    return visits.sum(1) - again.sum(1)


def _fewest_tiles(work: DocumentZigzagWork) -> torch.Tensor:
    """At most the tiles that are visited, nearly as many: int64 [R, R].

    A rectangle's first tile counts as one that another has visited wherever a document before it
    may reach there. So no table by (document, rank, source) is needed.
    """
    begin, near, end = work.bounds
    empty = torch.zeros_like(begin)

    def tiles(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        count = ((last - 1) >> _TILE_BITS) - (first >> _TILE_BITS) + 1
        return torch.where(first < last, count, empty)

    def met(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return (first < last) & ((begin - 1) >> _TILE_BITS == first >> _TILE_BITS)

    whole, far, before = (begin, end), (near, end), (begin, near)
    rows = tiles(*whole)
    count = work.multiply(tiles(*far), rows, rows, tiles(*before))
    count -= work.multiply(met(*far), met(*whole), met(*whole), met(*before))
    squares = (rows * (rows + 1) // 2).sum(0) - met(*whole).sum(0)
    return count + squares.diag()


def _first_tokens(work: Work, room: int) -> torch.Tensor:
    """Local index of the first token of each document on each rank, ranks ``room`` apart."""
    if isinstance(work, BlockWork):
        owner, document, begin, _ = work.pieces
        first, _ = group_runs(owner, document, len(work.starts))
        return work.layout.tokens_before(begin[first], owner[first]) + owner[first] * room
    every = torch.arange(work.layout.ring_size)
    begin = work.layout.tokens_before(work.starts[:, None], every)
    end = work.layout.tokens_before(work.ends[:, None], every)
    return (begin + every * room)[begin < end]


def _visits(row: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Tiles that cuts of queries visit and no cut before them in the same row of tiles has.

    Args:
        row: row of tiles of each cut: int64 [N], ascending.
        low: first key that the cut sees: int64 [N] or [N, R].
        high: past the last one; ascends over the cuts of a row.
    """
    # Shifts, for integer division takes ten times as long.
    left, right = low >> _TILE_BITS, (high + (_TILE - 1)) >> _TILE_BITS
    sees = high > low
    visits = (right - left).mul_(sees)
    # Documents that meet in a row may meet in a tile of keys.
    meets = torch.zeros(len(row) + 1, dtype=torch.bool)
    meets[1:-1] = row[1:] == row[:-1]
    some = (meets[1:] | meets[:-1]).nonzero()[:, 0]
    if len(some):
        left, right, sees = left[some], right[some], sees[some]
        before = row[some].view(-1, *[1] * (low.dim() - 1)) * right.max()
        reached = torch.where(sees, before + right - 1, -1).cummax(0).values
        again = sees[1:] & (reached[:-1] == (before + left)[1:])
        visits[some[1:]] -= again.to(torch.int64)
    return visits


_COUNTS: dict[str, Callable[[Work], torch.Tensor]] = {
    "auto": _count_calls,
    "cpu": _count_calls,
    "reference": _count_calls,
    "triton": _count_tiles,
    "flash": _count_varlen_calls,
}
BACKENDS = tuple(_COUNTS)
"""Backends whose cost is known; "auto" counts as "cpu" does."""


def _strips(pieces: Pieces, seen: torch.Tensor) -> torch.Tensor:
    """Which pieces begin a strip: they see a key, and more than the piece above. bool [P, R]."""
    begins = seen > 0
    follows = (pieces.owner[1:] == pieces.owner[:-1]) & (
        pieces.document[1:] == pieces.document[:-1]
    )
    begins[1:] &= ~follows[:, None] | (seen[1:] != seen[:-1])
    # A rank's own keys are squares.
    return begins.scatter_(1, pieces.owner[:, None], False)


def _beside_pairs(rows: torch.Tensor) -> torch.Tensor:
    """What diagonals of ``rows`` rows cost the CPU kernel beside their pairs.

    It cuts them until they are short, and computes all of those, hidden pairs too.
    """
    halvings = torch.zeros_like(rows)
    longest = int(rows.max()) if rows.numel() else 0
    for bit in range(DIAGONAL_ROWS.bit_length() - 1, longest.bit_length()):
        halvings += rows >> bit > 0
    step = KEYS_STEP << halvings
    each = ((rows + step - 1) // step).clamp(min=1) * KEYS_STEP
    leaves = (rows + each - 1) // each
    rest = rows - (leaves - 1) * each
    wasted = ((leaves - 1) * each * (each - 1) + rest * (rest - 1)) // 2
    return wasted + _PAIRS_PER_CALL * (2 * leaves - 1) * (rows > 0)


def _some(rows: torch.Tensor) -> torch.Tensor:
    """Whether there are any."""
    return (rows > 0).to(torch.int64)


def _sides(rows: torch.Tensor) -> torch.Tensor:
    """Rows of the tiles that hold so many."""
    return -(-rows // _TILE) * _TILE


def _triangle(rows: torch.Tensor) -> torch.Tensor:
    """Area of the tiles on and below diagonals of ``rows`` rows."""
    tiles = -(-rows // _TILE)
    return tiles * (tiles + 1) // 2 * _TILE**2
