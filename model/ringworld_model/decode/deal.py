"""Who keeps which token of a row: blocks dealt to the ranks in turn, so that no rank keeps more.

A rule, not a table: every rank can say what any other holds, and the cache may grow for ever
without moving a token. Within a rank a row's tokens lie in the order of their positions, in slots
0, 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Run(NamedTuple):
    """Neighbouring positions [start, stop) of a row that one rank keeps."""

    start: int
    stop: int
    owner: int


@dataclass(frozen=True, slots=True)
class Deal:
    """Block j of a row belongs to rank ``(first + j) mod ring_size``.

    ``first`` is the row's own: rows that begin at different ranks balance a batch of short ones.

    Attributes:
        block: tokens of a block, at least 1.
        ring_size: ranks.
    """

    block: int
    ring_size: int

    def owner(self, position: int, first: int) -> int:
        """The rank that keeps a position."""
        return (first + position // self.block) % self.ring_size

    def held(self, length: int, rank: int, first: int) -> int:
        """How many of a row's first ``length`` tokens a rank keeps.

        Of a position that the rank keeps itself this is the slot.
        """
        rounds, rest = divmod(length, self.block * self.ring_size)
        turn = (rank - first) % self.ring_size
        return rounds * self.block + min(max(rest - turn * self.block, 0), self.block)

    def runs(self, start: int, stop: int, first: int) -> Iterator[Run]:
        """Cut positions [start, stop) where the owner changes."""
        if self.ring_size == 1:
            if start < stop:
                yield Run(start, stop, 0)
            return
        while start < stop:
            end = min(stop, (start // self.block + 1) * self.block)
            yield Run(start, end, self.owner(start, first))
            start = end
