"""A ring kernel made of a block kernel: the plan's rectangles, one call each.

B rows, T local tokens, H query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ringworld_model.ring.kernel import RowGroup, accumulator
from ringworld_model.ring.merge import merge_


class BlockKernel(Protocol):
    """Attention of one rectangle. B rows, H query heads, Hkv key heads, Q queries, K keys, D width.

    Tensors are [B, heads, tokens, D] and may be strided; H is a multiple of Hkv; Q and K are at
    least 1; ``diagonal`` needs Q == K and lets query i see keys 0 to i.
    """

    @property
    def head_dims(self) -> range:
        """Values of D that the kernel takes."""

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
        self._out = torch.zeros(q.shape, dtype=exact, device=q.device).transpose(1, 2)
        self._lse = q.new_full(self._q.shape[:3], -torch.inf, dtype=exact)

    def step(self, step: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ``ForwardPass``."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        for rows, plan in self._rows:
            for q0, q1, k0, k1, diagonal in plan.rectangles(self._rank, step):
                queries = (rows, slice(None), slice(q0, q1))
                keys = (rows, slice(None), slice(k0, k1))
                block = self._block.forward(
                    self._q[queries], k[keys], v[keys], diagonal, self._scale
                )
                merge_(self._out[queries], self._lse[queries], *block)

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
        self._dq = torch.zeros(q.shape, dtype=self._lse.dtype, device=q.device).transpose(1, 2)

    def step(
        self, step: int, k: torch.Tensor, v: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> None:
        """See ``BackwardPass``."""
        k, v, dk, dv = (tensor.transpose(1, 2) for tensor in (k, v, dk, dv))
        for rows, plan in self._rows:
            for q0, q1, k0, k1, diagonal in plan.rectangles(self._rank, step):
                queries = (rows, slice(None), slice(q0, q1))
                keys = (rows, slice(None), slice(k0, k1))
                shares = self._block.backward(
                    self._grad[queries],
                    self._q[queries],
                    k[keys],
                    v[keys],
                    self._out[queries],
                    self._lse[queries],
                    diagonal,
                    self._scale,
                )
                self._dq[queries].add_(shares[0])
                dk[keys].add_(shares[1])
                dv[keys].add_(shares[2])

    def finish(self) -> torch.Tensor:
        """See ``BackwardPass``."""
        return self._dq.transpose(1, 2).to(self._q.dtype)
