"""Rectangles: the pieces of the attention matrix that a kernel computes in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch

_LEAF_STRIPS = 8
# On CPU, strips of 128 rows over long prefixes cost 20 to 60 % more than squares of equal area;
# halving until 8 strips remain costs no more than one causal call, with the fewest calls.


class Rectangle(NamedTuple):
    """Queries [q0, q1) attend to keys [k0, k1), both local indices.

    A diagonal one has as many queries as keys, and its query i sees its keys 0 to i.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    diagonal: bool

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        rows = self.q1 - self.q0
        return rows * (rows + 1) // 2 if self.diagonal else rows * (self.k1 - self.k0)


@dataclass(frozen=True, slots=True, eq=False)
class Rectangles:
    """What a rank computes at a ring step: full rectangles, or diagonal ones.

    A table, and each ``Rectangle`` made for who walks through it: of a thousand documents on 64
    ranks there are 64,000, which would take longer to make than all else of a plan, and as objects
    that stay would be looked at by Python's garbage collector time and again.

    Attributes:
        sides: q0, q1, k0 and k1 of each: int64 [N, 4]. Do not write to it.
        diagonal: whether all of them are diagonal; else none is.
    """

    sides: torch.Tensor
    diagonal: bool

    def __len__(self) -> int:
        """Number of rectangles."""
        return len(self.sides)

    def __iter__(self) -> Iterator[Rectangle]:
        """Each of them."""
        columns = (side.tolist() for side in self.sides.unbind(1))
        return map(Rectangle._make, zip(*columns, repeat(self.diagonal), strict=False))


def cover_staircase(strips: Sequence[tuple[int, int, int]], k0: int) -> Iterator[Rectangle]:
    """Cover a staircase by full rectangles, each pair exactly once.

    Args:
        strips: (q0, q1, k1) of neighbouring rows in order; a row sees keys [k0, k1). k1 rises
            strictly from strip to strip and is above k0.
        k0: first key of every strip.

    Yields:
        About ``len(strips)`` rectangles; long staircases are halved: the upper half's common keys
        become one large rectangle, and both halves are smaller staircases.
    """
    if len(strips) <= _LEAF_STRIPS:
        for q0, q1, k1 in strips:
            yield Rectangle(q0, q1, k0, k1, False)
        return
    middle = len(strips) // 2
    yield from cover_staircase(strips[:middle], k0)
    shared = strips[middle][2]
    yield Rectangle(strips[middle][0], strips[-1][1], k0, shared, False)
    yield from cover_staircase(strips[middle + 1 :], shared)


def count_layers(strips: torch.Tensor) -> torch.Tensor:
    """Fewest sets of the rectangles of staircases of so many strips, none sharing a row in a set.

    Halves of a staircase share no query and no key; strips of what is not halved share keys.
    """
    layers = torch.zeros_like(strips)
    while bool((long := strips > _LEAF_STRIPS).any()):
        layers += long
        strips = torch.where(long, strips // 2, strips)
    return layers + strips
