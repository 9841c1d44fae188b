"""A ring kernel made of a block kernel: the plan's rectangles, one call each.

B rows, T local tokens, H query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from ringworld_model.ring.clusters import cut_step
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
            q, keys, sums = self._q[rows], (k[rows], v[rows]), (self._out[rows], self._lse[rows])
            for cluster in cut_step(self._block.pieces, k.dtype, plan, self._rank, step, False):
                (q_part,) = cluster.queries(q)
                k_part, v_part = cluster.keys(*keys)
                for piece in cluster.pieces:
                    out, lse = self._block.forward(
                        q_part.narrow(2, piece.q0 - cluster.q0, piece.rows),
                        k_part.narrow(2, piece.k0 - cluster.k0, piece.keys),
                        v_part.narrow(2, piece.k0 - cluster.k0, piece.keys),
                        piece.diagonal,
                        self._scale,
                    )
                    so_far = [each.narrow(2, piece.q0, piece.rows) for each in sums]
                    if piece.first:
                        so_far[0].copy_(out)
                        so_far[1].copy_(lse)
                    else:
                        merge_(so_far[0], so_far[1], out, lse)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``ForwardPass``."""
        return self._out.transpose(1, 2), self._lse


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
            queries = (self._grad[rows], self._q[rows], self._out[rows])
            keys, lse = (k[rows], v[rows]), self._lse[rows]
            sums = (self._dq[rows], dk[rows], dv[rows])
            for cluster in cut_step(self._block.pieces, k.dtype, plan, self._rank, step, True):
                grad_out, q, out = cluster.queries(*queries)
                k_part, v_part = cluster.keys(*keys)
                for piece in cluster.pieces:
                    q0, k0 = piece.q0 - cluster.q0, piece.k0 - cluster.k0
                    shares = self._block.backward(
                        grad_out.narrow(2, q0, piece.rows),
                        q.narrow(2, q0, piece.rows),
                        k_part.narrow(2, k0, piece.keys),
                        v_part.narrow(2, k0, piece.keys),
                        out.narrow(2, q0, piece.rows),
                        lse.narrow(2, piece.q0, piece.rows),
                        piece.diagonal,
                        self._scale,
                    )
                    of_q = sums[0].narrow(2, piece.q0, piece.rows)
                    if piece.first:
                        of_q.copy_(shares[0])
                    else:
                        of_q.add_(shares[0])
                    sums[1].narrow(2, piece.k0, piece.keys).add_(shares[1])
                    sums[2].narrow(2, piece.k0, piece.keys).add_(shares[2])

    def finish(self) -> torch.Tensor:
        """See ``BackwardPass``."""
        return self._dq.transpose(1, 2)


def _padding(plan: RingPlan, rank: int) -> Iterator[slice]:
    """Local tokens between step 0's rectangles, in which each real token is once: it sees itself.

    So what step 0 finds begins a token's sums, and they need no zeros to be added to.
    """
    end = 0
    for each in plan.rectangles(rank, 0):
        if each.q0 > end:
            yield slice(end, each.q0)
        end = each.q1
    if plan.ring_length > end:
        yield slice(end, plan.ring_length)
