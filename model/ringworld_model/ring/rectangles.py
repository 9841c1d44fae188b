"""A ring kernel made of a block kernel: the plan's rectangles, one call each.

B rows, T local tokens, H query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from ringworld_model.ring.kernel import RowGroup, accumulator
from ringworld_model.ring.merge import merge_
from ringworld_model.ring.plan import RingPlan
from ringworld_model.ring.rectangle import Rectangle


class BlockKernel(Protocol):
    """Attention of one rectangle. B rows, H query heads, Hkv key heads, Q queries, K keys, D width.

    Tensors are [B, heads, tokens, D] and may be strided; H is a multiple of Hkv; Q and K are at
    least 1; ``diagonal`` needs Q == K and lets query i see keys 0 to i.
    """

    @property
    def head_dims(self) -> range:
        """Values of D that the kernel takes."""

    def pieces(
        self, dtype: torch.dtype, rectangle: Rectangle, backward: bool
    ) -> Sequence[tuple[Rectangle, bool]]:
        """Cut a rectangle for speed; a query's first keys come first.

        Returns:
            Rectangles that hold the same pairs, and whether the kernel computes inputs of ``dtype``
            in fp32 there. It then gets them in fp32: neighbours share rows, widened once.
        """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [B, H, Q, D], any float, and lse [B, H, Q] (fp32; fp64 for fp64 inputs)."""

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        diagonal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return this rectangle's share of dq, dk, dv, any float.

        Args:
            grad_out: [B, H, Q, D], q's dtype.
            q: [B, H, Q, D].
            k: [B, Hkv, K, D].
            v: [B, Hkv, K, D].
            out: [B, H, Q, D], q's dtype, over all keys of the row, not only this rectangle's.
            lse: [B, H, Q], over all keys of the row, finite.
            diagonal: as in ``forward``.
            scale: as in ``forward``.
        """


class RectangleKernel:
    """A ``RingKernel`` of one ``BlockKernel`` call a rectangle."""

    def __init__(self, block: BlockKernel) -> None:
        """Use ``block`` for every rectangle."""
        self._block = block

    @property
    def head_dims(self) -> range:
        """See ``RingKernel``."""
        return self._block.head_dims

    def forward(
        self, rank: int, rows: Sequence[RowGroup], q: torch.Tensor, scale: float
    ) -> _Forward:
        """See ``RingKernel``."""
        return _Forward(self._block, rank, rows, q, scale)

    def backward(
        self,
        rank: int,
        rows: Sequence[RowGroup],
        grad_out: torch.Tensor,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> _Backward:
        """See ``RingKernel``."""
        return _Backward(self._block, rank, rows, (grad_out, q, out, lse), scale)


class _Forward:
    def __init__(
        self,
        block: BlockKernel,
        rank: int,
        rows: Sequence[RowGroup],
        q: torch.Tensor,
        scale: float,
    ) -> None:
        self._block, self._rank, self._rows, self._scale = block, rank, rows, scale
        self._q = q.transpose(1, 2)
        exact = accumulator(q.dtype)
        self._out = torch.empty(q.shape, dtype=exact, device=q.device).transpose(1, 2)
        self._lse = q.new_empty(self._q.shape[:3], dtype=exact)

    def step(self, step: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ``ForwardPass``."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        for rows, plan in self._rows:
            if step == 0:
                for gap in _padding(plan, self._rank):
                    self._out[rows, :, gap], self._lse[rows, :, gap] = 0.0, -torch.inf
            for cluster in _clusters(self._block, k.dtype, plan, self._rank, step, False):
                (q_part,) = cluster.queries(rows, self._q)
                k_part, v_part = cluster.keys(rows, k, v)
                for rectangle, first in cluster.pieces:
                    queries, keys = cluster.inside(rectangle)
                    out, lse = self._block.forward(
                        q_part[queries],
                        k_part[keys],
                        v_part[keys],
                        rectangle.diagonal,
                        self._scale,
                    )
                    where = (rows, slice(None), slice(rectangle.q0, rectangle.q1))
                    if first:
                        self._out[where], self._lse[where] = out, lse
                    else:
                        merge_(self._out[where], self._lse[where], out, lse)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``ForwardPass``."""
        return self._out.transpose(1, 2).to(self._q.dtype), self._lse


class _Backward:
    def __init__(
        self,
        block: BlockKernel,
        rank: int,
        rows: Sequence[RowGroup],
        saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
    ) -> None:
        self._block, self._rank, self._rows, self._scale = block, rank, rows, scale
        grad_out, q, out, self._lse = saved
        self._grad, self._q, self._out = (tensor.transpose(1, 2) for tensor in (grad_out, q, out))
        self._dq = torch.empty(q.shape, dtype=self._lse.dtype, device=q.device).transpose(1, 2)

    def step(
        self, step: int, k: torch.Tensor, v: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> None:
        """See ``BackwardPass``."""
        k, v, dk, dv = (tensor.transpose(1, 2) for tensor in (k, v, dk, dv))
        for rows, plan in self._rows:
            if step == 0:
                for gap in _padding(plan, self._rank):
                    self._dq[rows, :, gap] = 0.0
            for cluster in _clusters(self._block, k.dtype, plan, self._rank, step, True):
                grad_out, q, out = cluster.queries(rows, self._grad, self._q, self._out)
                k_part, v_part = cluster.keys(rows, k, v)
                for rectangle, first in cluster.pieces:
                    queries, keys = cluster.inside(rectangle)
                    of_q = (rows, slice(None), slice(rectangle.q0, rectangle.q1))
                    of_k = (rows, slice(None), slice(rectangle.k0, rectangle.k1))
                    shares = self._block.backward(
                        grad_out[queries],
                        q[queries],
                        k_part[keys],
                        v_part[keys],
                        out[queries],
                        self._lse[of_q],
                        rectangle.diagonal,
                        self._scale,
                    )
                    if first:
                        self._dq[of_q] = shares[0]
                    else:
                        self._dq[of_q].add_(shares[0])
                    dk[of_k].add_(shares[1])
                    dv[of_k].add_(shares[2])

    def finish(self) -> torch.Tensor:
        """See ``BackwardPass``."""
        return self._dq.transpose(1, 2).to(self._q.dtype)


class _Cluster(NamedTuple):
    """Neighbouring pieces that share rows, and whether those are widened to fp32.

    A piece is a rectangle, and whether it is the first that its queries see.
    """

    pieces: list[tuple[Rectangle, bool]]
    wide: bool

    def queries(self, rows: slice, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The cluster's rows of query-side tensors [B, H, T, D]."""
        return self._part(rows, self._start(0), max(each.q1 for each, _ in self.pieces), tensors)

    def keys(self, rows: slice, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The cluster's rows of key-side tensors [B, Hkv, T, D]."""
        return self._part(rows, self._start(2), max(each.k1 for each, _ in self.pieces), tensors)

    def inside(self, rectangle: Rectangle) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the cluster's parts hold a rectangle's queries, and its keys."""
        q, k = self._start(0), self._start(2)
        every = slice(None)
        return (
            (every, every, slice(rectangle.q0 - q, rectangle.q1 - q)),
            (every, every, slice(rectangle.k0 - k, rectangle.k1 - k)),
        )

    def _start(self, field: int) -> int:
        return min(each[field] for each, _ in self.pieces)

    def _part(
        self, rows: slice, start: int, stop: int, tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        parts = [tensor[rows, :, start:stop] for tensor in tensors]
        return [part.to(torch.float32) for part in parts] if self.wide else parts


def _padding(plan: RingPlan, rank: int) -> Iterator[slice]:
    """Local tokens between step 0's rectangles, in which each real token is once: it sees itself.

    So what step 0 finds begins a token's sums, and they need no zeros to be added to.
    """
    end = 0
    for each in plan.rectangles(rank, 0):
        yield slice(end, each.q0)
        end = each.q1
    yield slice(end, plan.ring_length)


def _clusters(
    block: BlockKernel,
    dtype: torch.dtype,
    plan: RingPlan,
    rank: int,
    step: int,
    backward: bool,
) -> Iterator[_Cluster]:
    """Cut a step's rectangles into pieces, in their order, and gather them to clusters."""
    found: list[tuple[Rectangle, bool]] = []
    q1 = k1 = 0
    wide = False
    for whole in plan.rectangles(rank, step):
        for each, widens in block.pieces(dtype, whole, backward):
            apart = each.q0 >= q1 and each.k0 >= k1
            if found and (apart or widens != wide):
                yield _Cluster(found, wide)
                found, q1, k1 = [], 0, 0
            found.append((each, step == 0 and each.k0 == whole.k0))
            wide, q1, k1 = widens, max(q1, each.q1), max(k1, each.k1)
    if found:
        yield _Cluster(found, wide)
