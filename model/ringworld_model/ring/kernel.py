"""What a block kernel is: attention of some queries to some keys, forward and backward."""

from __future__ import annotations

from typing import Protocol

import torch


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
