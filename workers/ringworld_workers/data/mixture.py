"""Which piece of which example goes into which row: the packing plan of one stage.

The plan is a function of the seed, the length indexes, the mixture and the context length alone.
Every rank computes the same one, at any data_parallel size. A resumed run finds its place by
replaying lengths, reading no tokens, from a bookmark that its checkpoint holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

MIN_PIECE_TOKENS = 32
"""Text is cut no finer: a shorter piece has almost no context to predict from."""
OPEN_ROWS = 6
"""Rows kept open at a time. More pack tighter, and let a row wait longer."""
KEPT_ROWS = 4096
"""Plans kept for random access; asking for an older row replays from the start."""
BOOKMARK_ROWS = 1024
"""A bookmark is made every so many rows: a resume replays few more than that."""

Bookmark = dict[str, Any]
"""Where a plan stands after some row, as plain JSON."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of one example, in one pass over its source."""

    source: str
    epoch: int
    index: int
    start: int
    stop: int

    @property
    def id(self) -> str:
        """The piece as metrics name it: ``source/epoch/index/start-stop``."""
        return f"{self.source}/{self.epoch}/{self.index}/{self.start}-{self.stop}"


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The pieces of one row, in order; what they leave free is padding."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row, padding not included."""
        return sum(piece.stop - piece.start for piece in self.pieces)


class ExampleTooLong(ValueError):
    """An example that may not be cut does not fit a row.

    Attributes:
        source: its source.
        index: its place there.
    """

    def __init__(self, source: str, index: int, length: int, context_length: int) -> None:
        """Say which example, its length and the limit."""
        super().__init__(
            f"source {source!r}, example {index}: {length} tokens do not fit "
            f"context_length={context_length}; raise context_length, or take a source of "
            f"shorter examples"
        )
        self.source = source
        self.index = index


class RowPlanner:
    """Plans the rows of a mixture, in order, for ever or for a number of epochs.

    The source that lacks most tokens of its share gives the next example, so the weights hold over
    any stretch of rows, not only on average. Each source is walked in a fresh permutation per
    epoch. An example that may not be cut goes to the open row that it fills best; a document is cut
    to fill what open rows have left. Rows are numbered as they close.
    """

    def __init__(
        self,
        lengths: Mapping[str, npt.NDArray[np.int32]],
        splittable: Mapping[str, bool],
        weights: Mapping[str, float],
        context_length: int,
        seed: int,
        *,
        epochs: int | None = None,
        kept_rows: int = KEPT_ROWS,
    ) -> None:
        """Check that every example can be placed.

        Args:
            lengths: tokens of each example, by source; [N] each.
            splittable: whether a source's examples may be cut.
            weights: share of tokens by source; they need not sum to 1.
            context_length: tokens of a row.
            seed: of the permutations.
            epochs: passes over each source, after which the plan ends; empty: no end.
            kept_rows: how far back a row may be asked for without a replay.

        Raises:
            ExampleTooLong: an example that may not be cut is longer than a row.
            ValueError: no source, an empty source, or a weight that is not positive.
        """
        if not weights:
            raise ValueError("the mixture names no source")
        for name, weight in weights.items():
            if weight <= 0:
                raise ValueError(f"mixture.{name}={weight:g} is not positive; leave the source out")
            if len(lengths[name]) == 0:
                raise ValueError(f"source {name!r} holds no example; take it out of the mixture")
            longest = int(np.argmax(lengths[name]))
            if not splittable[name] and lengths[name][longest] > context_length:
                raise ExampleTooLong(name, longest, int(lengths[name][longest]), context_length)
        self._arguments = (lengths, splittable, weights, context_length, seed, epochs)
        self._kept: deque[RowPlan] = deque(maxlen=kept_rows)
        self._bookmarks: deque[Bookmark] = deque(maxlen=kept_rows // BOOKMARK_ROWS + 2)
        self._start_over()

    def _start_over(self) -> None:
        self._walk = _Walk(*self._arguments)
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
        lengths, splittable, weights, *numbers = self._arguments
        digest = hashlib.sha256(json.dumps([sorted(weights.items()), *numbers]).encode())
        for name in sorted(weights):
            digest.update(f"{name}:{splittable[name]}:{len(lengths[name])}".encode())
            digest.update(np.ascontiguousarray(lengths[name], np.int32).data)
        return digest.hexdigest()


@dataclass(slots=True)
class _Source:
    """Where a walk through one source stands."""

    name: str
    lengths: npt.NDArray[np.int32]
    splittable: bool
    share: float
    seed: int
    epochs: int | None
    epoch: int = -1
    order: list[int] = field(default_factory=list)
    position: int = 0
    start: int = 0
    drawn: int = 0

    def permute(self, epoch: int) -> None:
        """Begin an epoch. Sorting raw random words gives the same order on any numpy."""
        self.epoch = epoch
        key = zlib.crc32(self.name.encode())
        entropy = np.random.SeedSequence([self.seed & (2**64 - 1), key, self.epoch])
        words = np.random.PCG64(entropy).random_raw(len(self.lengths))
        self.order = np.argsort(words, kind="stable").tolist()
        self.position = 0

    @property
    def remaining(self) -> int:
        """Tokens left of the example at hand."""
        return int(self.lengths[self.order[self.position]]) - self.start

    def take(self, tokens: int) -> Piece:
        """Cut off the next tokens of the example at hand."""
        index = self.order[self.position]
        piece = Piece(self.name, self.epoch, index, self.start, self.start + tokens)
        self.drawn += tokens
        if tokens == self.remaining:
            self.start = 0
            self.position += 1
            if self.position == len(self.order):
                self.permute(self.epoch + 1)
        else:
            self.start += tokens
        return piece

    @property
    def exhausted(self) -> bool:
        """Whether its last epoch is over."""
        return self.epochs is not None and self.epoch >= self.epochs


@dataclass(slots=True, eq=False)
class _OpenRow:
    free: int
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.free -= piece.stop - piece.start

    def plan(self) -> RowPlan:
        return RowPlan(tuple(self.pieces))


class _Walk:
    """The plan in the making: where each source stands, and the rows that are still open."""

    def __init__(
        self,
        lengths: Mapping[str, npt.NDArray[np.int32]],
        splittable: Mapping[str, bool],
        weights: Mapping[str, float],
        context_length: int,
        seed: int,
        epochs: int | None,
    ) -> None:
        self._context_length = context_length
        # Half a row at most, so that any remainder of a document can be placed.
        self._min_piece = max(1, min(MIN_PIECE_TOKENS, context_length // 2))
        # An exact sum and a sorted list, so that the order in which a spec lists its sources plays
        # no part.
        total = math.fsum(weights.values())
        self._sources = [
            _Source(name, lengths[name], splittable[name], weights[name] / total, seed, epochs)
            for name in sorted(weights)
        ]
        for source in self._sources:
            source.permute(0)
        self._smallest = min(
            min(self._min_piece, int(s.lengths.min())) if s.splittable else int(s.lengths.min())
            for s in self._sources
        )
        self._rows: list[_OpenRow] = []

    def advance(self) -> list[RowPlan] | None:
        """Place one piece; the rows that this closes. None: the last epoch is over."""
        active = [source for source in self._sources if not source.exhausted]
        if not active:
            left, self._rows = self._rows, []
            return [row.plan() for row in left] or None
        drawn = sum(source.drawn for source in active)
        share = sum(source.share for source in active)
        # max takes the first of equals: ties go by name.
        source = max(active, key=lambda s: s.share / share * drawn - s.drawn)
        closed = []
        row, tokens = _place(source, self._rows, self._context_length, self._min_piece)
        if row is None:
            if len(self._rows) == OPEN_ROWS:
                # The oldest: no row waits without end.
                closed.append(self._rows.pop(0).plan())
            row = _OpenRow(self._context_length)
            self._rows.append(row)
        row.add(source.take(tokens))
        if row.free < self._smallest:
            self._rows.remove(row)
            closed.append(row.plan())
        return closed

    def place(self) -> Bookmark:
        """Where the walk stands, as plain JSON."""
        return {
            "sources": [[s.epoch, s.position, s.start, s.drawn] for s in self._sources],
            "open_rows": [[list(astuple(piece)) for piece in row.pieces] for row in self._rows],
        }

    def go_to(self, place: Bookmark) -> None:
        """Stand where ``place`` was taken."""
        for source, (epoch, position, start, drawn) in zip(
            self._sources, place["sources"], strict=True
        ):
            source.permute(epoch)
            source.position, source.start, source.drawn = position, start, drawn
        self._rows = [_OpenRow(self._context_length) for _ in place["open_rows"]]
        for row, pieces in zip(self._rows, place["open_rows"], strict=True):
            for piece in pieces:
                row.add(Piece(*piece))


def _place(
    source: _Source, rows: list[_OpenRow], context_length: int, min_piece: int
) -> tuple[_OpenRow | None, int]:
    """The open row that the source's next tokens fill best (None: a new one), and how many."""
    best: _OpenRow | None = None
    best_tokens = _fit(source, context_length, min_piece)
    for row in rows:
        tokens = _fit(source, row.free, min_piece)
        if tokens and (best is None or row.free < best.free):
            best, best_tokens = row, tokens
    return best, best_tokens


def _fit(source: _Source, free: int, min_piece: int) -> int:
    """How many of the source's next tokens go into a gap; 0: it does not fit."""
    remaining = source.remaining
    if remaining <= free:
        return remaining
    if not source.splittable:
        return 0
    # Leave enough for the document's rest to be a piece as well.
    tokens = min(free, remaining - min_piece)
    return tokens if tokens >= min_piece else 0
