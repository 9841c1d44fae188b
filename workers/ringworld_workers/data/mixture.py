"""Which piece of which example goes into which row: the packing plan of one stage.

The plan is a function of the seed, the length indexes, the mixture and the context length alone.
Every rank computes the same one, at any data_parallel size, and a resumed run finds its place by
replaying lengths, reading no tokens.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

MIN_PIECE_TOKENS = 32
"""Text is cut no finer: a shorter piece has almost no context to predict from."""
OPEN_ROWS = 6
"""Rows kept open at a time. More pack tighter, and let a row wait longer."""
_KEPT_ROWS = 4096
"""Plans kept for random access; asking for an older row replays from the start."""


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
    ) -> None:
        """Check that every example can be placed.

        Args:
            lengths: tokens of each example, by source; [N] each.
            splittable: whether a source's examples may be cut.
            weights: share of tokens by source; they need not sum to 1.
            context_length: tokens of a row.
            seed: of the permutations.
            epochs: passes over each source, after which the plan ends; empty: no end.

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
        self._restart()

    def _restart(self) -> None:
        self._rows = _plan_rows(*self._arguments)
        self._planned = 0
        self._kept: deque[RowPlan] = deque(maxlen=_KEPT_ROWS)

    def plan(self, row: int) -> RowPlan:
        """The plan of a row. Going forward is cheap; far back replays from the start.

        Raises:
            IndexError: a negative row, or one past the last epoch.
        """
        if row < 0:
            raise IndexError(f"row {row} is negative")
        if row < self._planned - len(self._kept):
            self._restart()
        while self._planned <= row:
            plan = next(self._rows, None)
            if plan is None:
                raise IndexError(f"row {row}: the plan ends after {self._planned} rows")
            self._kept.append(plan)
            self._planned += 1
        return self._kept[row - self._planned]

    def iter_from(self, cursor: int) -> Iterator[RowPlan]:
        """The plans of rows cursor, cursor + 1, ..., on an iterator of its own."""
        return islice(_plan_rows(*self._arguments), cursor, None)


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

    def permute(self) -> None:
        """Go on to the next epoch. Sorting raw random words gives the same order on any numpy."""
        self.epoch += 1
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
                self.permute()
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


def _plan_rows(
    lengths: Mapping[str, npt.NDArray[np.int32]],
    splittable: Mapping[str, bool],
    weights: Mapping[str, float],
    context_length: int,
    seed: int,
    epochs: int | None,
) -> Iterator[RowPlan]:
    # Half a row at most, so that any remainder of a document can be placed.
    min_piece = max(1, min(MIN_PIECE_TOKENS, context_length // 2))
    total_weight = sum(weights.values())
    # Sorted, so that the order in which a spec lists its sources plays no part.
    sources = [
        _Source(name, lengths[name], splittable[name], weights[name] / total_weight, seed, epochs)
        for name in sorted(weights)
    ]
    for source in sources:
        source.permute()
    smallest = min(
        min(min_piece, int(s.lengths.min())) if s.splittable else int(s.lengths.min())
        for s in sources
    )
    rows: list[_OpenRow] = []
    while active := [source for source in sources if not source.exhausted]:
        drawn = sum(source.drawn for source in active)
        share = sum(source.share for source in active)
        # max takes the first of equals: ties go by name.
        source = max(active, key=lambda s: s.share / share * drawn - s.drawn)
        row, tokens = _place(source, rows, context_length, min_piece)
        if row is None:
            if len(rows) == OPEN_ROWS:
                # The oldest: no row waits without end.
                yield RowPlan(tuple(rows.pop(0).pieces))
            row = _OpenRow(context_length)
            rows.append(row)
        row.add(source.take(tokens))
        if row.free < smallest:
            rows.remove(row)
            yield RowPlan(tuple(row.pieces))
    for row in rows:
        yield RowPlan(tuple(row.pieces))


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
