"""One source of a mixture: in which order its examples come, and where a walk through it stands."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ringworld_workers.data.row_plan import Piece

BLOCK_SHARDS = 8
"""Shards whose examples are shuffled together. A remote dataset need not lie on disk as a whole:
while a block is read, its shards are needed and no others."""


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """What a plan needs to know of a source.

    Attributes:
        lengths: [N] int32, tokens of each example.
        weight: share of the mixture's tokens; they need not sum to 1.
        splittable: whether an example may be cut into pieces.
        apart: whether its rows hold no other source's examples.
        shard_sizes: examples of each shard, in order; empty: all are in one.
    """

    lengths: npt.NDArray[np.int32]
    weight: float
    splittable: bool = False
    apart: bool = False
    shard_sizes: tuple[int, ...] = ()


@dataclass(slots=True)
class SourceWalk:
    """Where a walk through one source stands: a fresh permutation each epoch.

    Shards come in random order, in blocks of ``BLOCK_SHARDS``; the examples of a block are shuffled
    among each other. A dataset of fewer shards is one block, and its order any permutation.

    Attributes:
        share: of the mixture's tokens; the shares of all sources sum to 1.
        drawn: tokens taken so far.
    """

    name: str
    source: PlannedSource
    share: float
    seed: int
    epochs: int | None
    epoch: int = -1
    position: int = 0
    start: int = 0
    drawn: int = 0
    order: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    blocks: list[list[int]] = field(default_factory=list)
    block_ends: list[int] = field(default_factory=list)

    def permute(self, epoch: int) -> None:
        """Begin an epoch. Sorting raw random words gives the same order on any numpy."""
        self.epoch, self.position = epoch, 0
        sizes = self.source.shard_sizes or (len(self.source.lengths),)
        shards = np.argsort(self._words(len(sizes), 1), kind="stable")
        block_of = np.empty(len(sizes), np.int64)
        block_of[shards] = np.arange(len(sizes)) // BLOCK_SHARDS
        words = self._words(len(self.source.lengths))
        if len(sizes) <= BLOCK_SHARDS:
            self.order = np.argsort(words, kind="stable")
        else:
            self.order = np.lexsort((words, np.repeat(block_of, sizes)))
        self.blocks = [
            shards[first : first + BLOCK_SHARDS].tolist()
            for first in range(0, len(sizes), BLOCK_SHARDS)
        ]
        held = [sum(sizes[shard] for shard in block) for block in self.blocks]
        self.block_ends = np.cumsum(held).tolist()

    def _words(self, number: int, *more: int) -> npt.NDArray[np.uint64]:
        key = zlib.crc32(self.name.encode())
        entropy = np.random.SeedSequence([self.seed & (2**64 - 1), key, self.epoch, *more])
        words: npt.NDArray[np.uint64] = np.random.PCG64(entropy).random_raw(number)
        return words

    @property
    def remaining(self) -> int:
        """Tokens left of the example at hand."""
        return int(self.source.lengths[self.order[self.position]]) - self.start

    @property
    def exhausted(self) -> bool:
        """Whether its last epoch is over."""
        return self.epochs is not None and self.epoch >= self.epochs

    def take(self, tokens: int) -> Piece:
        """Cut off the next tokens of the example at hand."""
        index = int(self.order[self.position])
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

    def coming_shards(self) -> list[list[int]]:
        """Shards of the block that the walk is in, and of the next one of this epoch."""
        block = int(np.searchsorted(self.block_ends, self.position, side="right"))
        return self.blocks[block : block + 2]
