"""What a ring kernel is: attention of one rank's queries to the keys of one ring step at a time.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ringworld_model.ring.plan import RingPlan


class RowGroup(NamedTuple):
    """Neighbouring rows of the batch that share a plan."""

    rows: slice
    plan: RingPlan


class ForwardPass(Protocol):
    """The forward pass of one rank, step by step."""

    def step(self, step: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Merge in what the queries see of rank (rank - step) mod R.

        Args:
            step: ring step; each of 0 to R - 1 once, ascending.
            k: [B, T, Hkv, D]. Only rows that ``plan.rectangles(rank, step)`` names are meaningful;
                the others may hold anything, NaN too, and reach no result. May be overwritten after
                the return (in stream order on CUDA).
            v: [B, T, Hkv, D], likewise.
        """

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and lse.

        Returns:
            out [B, T, H, D] in q's dtype, or in that of the sums for the caller to round, 0 where
            a token saw nothing; lse [B, H, T] in fp32 (fp64 for fp64 inputs), -inf there.
        """


class BackwardPass(Protocol):
    """The backward pass of one rank, step by step."""

    def step(
        self, step: int, k: torch.Tensor, v: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> None:
        """Add one ring step's share to ``dk`` and ``dv`` in place, and to the dq kept inside.

        Args:
            step: as in ``ForwardPass.step``.
            k: as in ``ForwardPass.step``.
            v: as in ``ForwardPass.step``.
            dk: [B, T, Hkv, D], fp32 (fp64 for fp64 inputs).
            dv: [B, T, Hkv, D], likewise.
        """

    def finish(self) -> torch.Tensor:
        """Return dq [B, T, H, D], in q's dtype or in that of the sums."""


class RingKernel(Protocol):
    """A backend of ring attention. Stateless: a call's state is in its passes.

    The same inputs give the same bits. Padding tokens may hold NaN in every input: their out and
    gradients are 0, their lse is -inf, and nothing of theirs reaches another token.
    """

    @property
    def head_dims(self) -> range:
        """Values of D that the kernel takes."""

    def forward(
        self, rank: int, rows: Sequence[RowGroup], q: torch.Tensor, scale: float
    ) -> ForwardPass:
        """Begin a forward pass.

        Args:
            rank: this rank's place in the ring.
            rows: of the whole batch.
            q: [B, T, H, D], the last dim contiguous, the other strides any.
            scale: factor of the scores.
        """

    def backward(
        self,
        rank: int,
        rows: Sequence[RowGroup],
        grad_out: torch.Tensor,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> BackwardPass:
        """Begin a backward pass.

        Args:
            rank: as in ``forward``.
            rows: as in ``forward``.
            grad_out: [B, T, H, D], q's dtype, the last dim contiguous.
            q: as in ``forward``.
            out: what the forward pass gave; the last dim contiguous.
            lse: what the forward pass gave.
            scale: as in ``forward``.
        """


def group_rows(plans: Sequence[RingPlan]) -> list[RowGroup]:
    """Group neighbouring rows of equal plans; ``plans`` holds one a row."""
    groups: list[RowGroup] = []
    start = 0
    for end in range(1, len(plans) + 1):
        if end == len(plans) or plans[end] != plans[start]:
            groups.append(RowGroup(slice(start, end), plans[start]))
            start = end
    return groups


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over tensors of ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
