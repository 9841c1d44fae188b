"""Which piece of which example goes into which row: the packing plan of one stage.

The plan is a function of the seed, the length indexes, the mixture, the packing and the context
length alone. Every rank computes the same one, at any data_parallel size. A resumed run finds its
place by replaying lengths, reading no tokens, from a bookmark that its checkpoint holds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ringworld_workers.data.row_plan import ExampleTooLong, Piece, RowPlan
from ringworld_workers.data.source_walk import PlannedSource, SourceWalk

Packing = Literal["best_fit", "sequential"]

MIN_PIECE_TOKENS = 32
"""Text is cut no finer: a shorter piece has almost no context to predict from."""
OPEN_ROWS: dict[Packing, int] = {"best_fit": 6, "sequential": 1}
"""Rows kept open at a time by sources that share rows. More pack tighter, and let a row wait
longer."""
KEPT_ROWS = 4096
"""Plans kept for random access; asking for an older row replays from the start."""
BOOKMARK_ROWS = 1024
"""A bookmark is made every so many rows: a resume replays few more than that."""

Bookmark = dict[str, Any]
"""Where a plan stands after some row, as plain JSON."""


class RowPlanner:
    """Plans the rows of a mixture, in order, for ever or for a number of epochs.

    The source that lacks most tokens of its share gives the next example, so the weights hold over
    any stretch of rows, not only on average: of the tokens of any window, a source has its share to
    within ``(sources + groups * OPEN_ROWS[packing]) * context_length`` tokens, however long the
    window is. Groups are the sources that share rows (one) and those that are packed apart (one
    each). Each source is walked in a fresh permutation per epoch.

    ``best_fit`` puts an example that may not be cut into the open row that it fills best, and cuts
    a document to fill what open rows have left. ``sequential`` has one row open: it takes what
    fits, and is closed by what does not. Rows are numbered as they close.
    """

    def __init__(
        self,
        sources: Mapping[str, PlannedSource],
        context_length: int,
        seed: int,
        *,
        packing: Packing = "best_fit",
        epochs: int | None = None,
        kept_rows: int = KEPT_ROWS,
    ) -> None:
        """Check that every example can be placed.

        Args:
            sources: what to draw from, by name.
            context_length: tokens of a row.
            seed: of the permutations.
            packing: how examples come into rows.
            epochs: passes over each source, after which the plan ends; empty: no end.
            kept_rows: how far back a row may be asked for without a replay.

        Raises:
            ExampleTooLong: an example that may not be cut is longer than a row.
            ValueError: no source, an empty source, or a weight that is not positive.
        """
        if not sources:
            raise ValueError("the mixture names no source")
        for name, source in sources.items():
            if source.weight <= 0:
                raise ValueError(
                    f"mixture.{name}={source.weight:g} is not positive; leave the source out"
                )
            if len(source.lengths) == 0:
                raise ValueError(f"source {name!r} holds no example; take it out of the mixture")
            longest = int(np.argmax(source.lengths))
            if not source.splittable and source.lengths[longest] > context_length:
                raise ExampleTooLong(name, longest, int(source.lengths[longest]), context_length)
        self._sources = dict(sources)
        self._numbers = (context_length, seed, epochs, packing)
        self._kept: deque[RowPlan] = deque(maxlen=kept_rows)
        self._bookmarks: deque[Bookmark] = deque(maxlen=kept_rows // BOOKMARK_ROWS + 2)
        self._start_over()

    def _start_over(self) -> None:
        self._walk = _Walk(self._sources, *self._numbers)
        self._planned = 0
        self._kept.clear()
        self._bookmarks.clear()

    def plan(self, row: int) -> RowPlan:
        """The plan of a row. Going forward is cheap; far back replays from the start.

        Raises:
            IndexError: a negative row, or one past the last epoch.
        """
        if row < 0:
            raise IndexError(f"row {row} is negative")
        if row < self._planned - len(self._kept):
            self._start_over()
        while self._planned <= row:
            closed = self._walk.advance()
            if closed is None:
                raise IndexError(f"row {row}: the plan ends after {self._planned} rows")
            before = self._planned
            self._kept.extend(closed)
            self._planned += len(closed)
            if self._planned // BOOKMARK_ROWS > before // BOOKMARK_ROWS:
                place = {"digest": self.digest, "row": self._planned, **self._walk.place()}
                self._bookmarks.append(place)
        return self._kept[row - self._planned]

    def iter_from(self, cursor: int) -> Iterator[RowPlan]:
        """The plans of rows cursor, cursor + 1, ... to the last epoch's end."""
        while True:
            try:
                yield self.plan(cursor)
            except IndexError:
                return
            cursor += 1

    def bookmark(self, row: int) -> Bookmark | None:
        """A place at or before ``row`` to continue from; None: no nearer one than the start."""
        return next((mark for mark in reversed(self._bookmarks) if mark["row"] <= row), None)

    def open_at(self, bookmark: Bookmark) -> bool:
        """Continue from a bookmark; the plans of the rows after it are what they always are.

        Returns:
            False, and nothing is done, if the bookmark is of other data or another mixture.
        """
        if bookmark["digest"] != self.digest:
            return False
        self._start_over()
        self._walk.go_to(bookmark)
        self._planned = int(bookmark["row"])
        self._bookmarks.append(bookmark)
        return True

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the plan is a function of."""
        weights = sorted((name, source.weight) for name, source in self._sources.items())
        digest = hashlib.sha256(json.dumps([weights, *self._numbers]).encode())
        for name, source in sorted(self._sources.items()):
            how = (source.splittable, source.apart, source.shard_sizes, len(source.lengths))
            digest.update(f"{name}:{how}".encode())
            digest.update(np.ascontiguousarray(source.lengths, np.int32).data)
        return digest.hexdigest()

    def coming_shards(self, source: str) -> list[list[int]]:
        """Shards that a source's examples will be drawn from, soonest first."""
        return self._walk.sources[source].coming_shards()


@dataclass(slots=True, eq=False)
class _OpenRow:
    free: int
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.free -= piece.stop - piece.start

    def plan(self) -> RowPlan:
        return RowPlan(tuple(self.pieces))


_SHARED = ""
"""Name of the group of all sources that are not packed apart."""


@dataclass(slots=True)
class _Group:
    """Rows that are open to the same sources."""

    most_rows: int
    smallest: int = 2**62
    """Fewest tokens that any of its sources may still add to a row."""
    rows: list[_OpenRow] = field(default_factory=list)


class _Walk:
    """The plan in the making: where each source stands, and the rows that are still open."""

    def __init__(
        self,
        sources: Mapping[str, PlannedSource],
        context_length: int,
        seed: int,
        epochs: int | None,
        packing: Packing,
    ) -> None:
        self._context_length = context_length
        # Half a row at most, so that any remainder of a document can be placed.
        self._min_piece = max(1, min(MIN_PIECE_TOKENS, context_length // 2))
        # An exact sum and a sorted list, so that the order in which a spec lists its sources plays
        # no part.
        total = math.fsum(source.weight for source in sources.values())
        self.sources = {
            name: SourceWalk(name, sources[name], sources[name].weight / total, seed, epochs)
            for name in sorted(sources)
        }
        self._groups: dict[str, _Group] = {}
        for name, walk in self.sources.items():
            walk.permute(0)
            group = self._groups.setdefault(
                name if walk.source.apart else _SHARED, _Group(OPEN_ROWS[packing])
            )
            shortest = int(walk.source.lengths.min())
            if walk.source.splittable:
                shortest = min(self._min_piece, shortest)
            group.smallest = min(group.smallest, shortest)

    def advance(self) -> list[RowPlan] | None:
        """Place one piece; the rows that this closes. None: the last epoch is over."""
        active = [source for source in self.sources.values() if not source.exhausted]
        if not active:
            return self._close_all() or None
        drawn = sum(source.drawn for source in active)
        share = sum(source.share for source in active)
        # max takes the first of equals: ties go by name.
        source = max(active, key=lambda s: s.share / share * drawn - s.drawn)
        group = self._groups[source.name if source.source.apart else _SHARED]
        closed = []
        row, tokens = _place(source, group.rows, self._context_length, self._min_piece)
        if row is None:
            if len(group.rows) == group.most_rows:
                # The oldest: no row waits without end.
                closed.append(group.rows.pop(0).plan())
            row = _OpenRow(self._context_length)
            group.rows.append(row)
        row.add(source.take(tokens))
        if row.free < group.smallest:
            group.rows.remove(row)
            closed.append(row.plan())
        return closed

    def _close_all(self) -> list[RowPlan]:
        left = [row.plan() for _, group in sorted(self._groups.items()) for row in group.rows]
        for group in self._groups.values():
            group.rows = []
        return left

    def place(self) -> Bookmark:
        """Where the walk stands, as plain JSON."""
        return {
            "sources": {
                name: [s.epoch, s.position, s.start, s.drawn] for name, s in self.sources.items()
            },
            "open_rows": {
                name: [[list(astuple(piece)) for piece in row.pieces] for row in group.rows]
                for name, group in self._groups.items()
            },
        }

    def go_to(self, place: Bookmark) -> None:
        """Stand where ``place`` was taken."""
        for name, (epoch, position, start, drawn) in place["sources"].items():
            source = self.sources[name]
            source.permute(epoch)
            source.position, source.start, source.drawn = position, start, drawn
        for name, rows in place["open_rows"].items():
            group = self._groups[name]
            group.rows = [_OpenRow(self._context_length) for _ in rows]
            for row, pieces in zip(group.rows, rows, strict=True):
                for piece in pieces:
                    row.add(Piece(*piece))


def _place(
    source: SourceWalk, rows: list[_OpenRow], context_length: int, min_piece: int
) -> tuple[_OpenRow | None, int]:
    """The open row that the source's next tokens fill best (None: a new one), and how many."""
    best: _OpenRow | None = None
    best_tokens = _fit(source, context_length, min_piece)
    for row in rows:
        tokens = _fit(source, row.free, min_piece)
        if tokens and (best is None or row.free < best.free):
            best, best_tokens = row, tokens
    return best, best_tokens


def _fit(source: SourceWalk, free: int, min_piece: int) -> int:
    """How many of the source's next tokens go into a gap; 0: it does not fit."""
    remaining = source.remaining
    if remaining <= free:
        return remaining
    if not source.source.splittable:
        return 0
    # Leave enough for the document's rest to be a piece as well.
    tokens = min(free, remaining - min_piece)
    return tokens if tokens >= min_piece else 0
