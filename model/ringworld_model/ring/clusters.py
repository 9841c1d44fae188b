"""Clusters: the rectangles of a ring step, cut for a block kernel and gathered by shared rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ringworld_model.ring.plan import RingPlan
from ringworld_model.ring.rectangle import Rectangle

Cut = Callable[[torch.dtype, Rectangle, bool], Sequence[tuple[Rectangle, bool]]]
"""``BlockKernel.pieces``."""


class Piece(NamedTuple):
    """What one call computes: local queries and keys, see ``Rectangle``.

    Attributes:
        q0: first query.
        rows: queries.
        k0: first key.
        keys: keys.
        diagonal: whether query i sees keys up to i only.
        first: whether its queries have seen no key before.
    """

    q0: int
    rows: int
    k0: int
    keys: int
    diagonal: bool
    first: bool


class Cluster(NamedTuple):
    """Neighbouring pieces that share rows.

    Attributes:
        q0: first query of any.
        num_queries: up to the last query of any.
        k0: first key of any.
        num_keys: up to the last key of any.
        wide: whether they are computed in fp32.
        pieces: in order.
    """

    q0: int
    num_queries: int
    k0: int
    num_keys: int
    wide: bool
    pieces: tuple[Piece, ...]

    def queries(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The cluster's rows of query-side tensors [B, H, T, D], in the dtype to compute in."""
        return self._part(self.q0, self.num_queries, tensors)

    def keys(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The cluster's rows of key-side tensors [B, Hkv, T, D], likewise."""
        return self._part(self.k0, self.num_keys, tensors)

    def _part(self, start: int, length: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        parts = [tensor.narrow(2, start, length) for tensor in tensors]
        return [part.to(torch.float32) for part in parts] if self.wide else parts


def cut_step(
    cut: Cut, dtype: torch.dtype, plan: RingPlan, rank: int, step: int, backward: bool
) -> list[Cluster]:
    """Cut a step's rectangles into pieces, in their order, and gather them to clusters.

    Kept with the plan: every layer and every chunk of heads asks for the same.

    Args:
        cut: of the kernel that computes the pieces.
        dtype: of q, k and v.
        plan: of the rows.
        rank: a place in the ring.
        step: ring step.
        backward: whether it is for the backward pass.
    """
    key = ("clusters", cut, dtype, rank, step, backward)
    if key not in plan.cache:
        plan.cache[key] = _gather(cut, dtype, plan, rank, step, backward)
    found: list[Cluster] = plan.cache[key]
    return found


def _gather(
    cut: Cut, dtype: torch.dtype, plan: RingPlan, rank: int, step: int, backward: bool
) -> list[Cluster]:
    clusters: list[Cluster] = []
    pieces: list[Piece] = []
    q1 = k1 = 0
    wide = False
    for whole in plan.rectangles(rank, step):
        for each, widens in cut(dtype, whole, backward):
            if pieces and (widens != wide or (each.q0 >= q1 and each.k0 >= k1)):
                clusters.append(_cluster(pieces, wide))
                pieces, q1, k1 = [], 0, 0
            rows, keys = each.q1 - each.q0, each.k1 - each.k0
            first = step == 0 and each.k0 == whole.k0
            pieces.append(Piece(each.q0, rows, each.k0, keys, each.diagonal, first))
            wide, q1, k1 = widens, max(q1, each.q1), max(k1, each.k1)
    return [*clusters, _cluster(pieces, wide)] if pieces else clusters


def _cluster(pieces: Sequence[Piece], wide: bool) -> Cluster:
    q0, k0 = min(each.q0 for each in pieces), min(each.k0 for each in pieces)
    rows = max(each.q0 + each.rows for each in pieces) - q0
    keys = max(each.k0 + each.keys for each in pieces) - k0
    return Cluster(q0, rows, k0, keys, wide, tuple(pieces))
