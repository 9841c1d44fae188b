"""What a variable-length op is, and one made of a block kernel.

T tokens of all sequences, Tk keys of all sequences, H query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from ringworld_model.ring.rectangles import BlockKernel
from ringworld_model.ring.varlen import Sequences


class VarlenOp(Protocol):
    """Attention of packed sequences, each to its own keys, forward and backward."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] and lse [H, T] (fp32; fp64 for fp64 inputs).

        Args:
            q: [T, H, D], the last dim contiguous, as of all here.
            k: [Tk, Hkv, D].
            v: [Tk, Hkv, D].
            sequences: where each begins and ends.
            scale: factor of the scores.
        """

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return these keys' share of dq [T, H, D], dk and dv [Tk, Hkv, D].

        Args:
            grad_out: [T, H, D].
            q: as in ``forward``, like k, v, sequences and scale.
            k: [Tk, Hkv, D].
            v: [Tk, Hkv, D].
            out: [T, H, D], q's dtype, over all keys of each row, not only those given here.
            lse: [H, T], likewise; contiguous and finite.
            sequences: where each begins and ends.
            scale: factor of the scores.
        """


class BlockwiseOp:
    """A ``VarlenOp`` that gives each sequence to a block kernel. For checks: slow, any device."""

    def __init__(self, block: BlockKernel) -> None:
        """Use ``block`` for every sequence."""
        self._block = block

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``VarlenOp.forward``; out is in the block kernel's dtype."""
        outs, lses = [], []
        for rows, cols in _ranges(sequences):
            queries, keys, values = _heads_first(q[rows], k[cols], v[cols])
            out, lse = self._block.forward(queries, keys, values, sequences.causal, scale)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, 1)

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``VarlenOp.backward``; the gradients are in the block kernel's dtype."""
        shares = []
        for rows, cols in _ranges(sequences):
            grad, queries, keys, values, result = _heads_first(
                grad_out[rows], q[rows], k[cols], v[cols], out[rows]
            )
            share = self._block.backward(
                grad, queries, keys, values, result, lse[None, :, rows], sequences.causal, scale
            )
            shares.append([part[0].transpose(0, 1) for part in share])
        dq, dk, dv = (torch.cat(list(parts)) for parts in zip(*shares, strict=True))
        return dq, dk, dv


def _ranges(sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    queries, keys = sequences.cu_queries.tolist(), sequences.cu_keys.tolist()
    for at in range(len(queries) - 1):
        yield slice(queries[at], queries[at + 1]), slice(keys[at], keys[at + 1])


def _heads_first(*packed: torch.Tensor) -> list[torch.Tensor]:
    """[tokens, heads, D] -> [1, heads, tokens, D]."""
    return [tensor.transpose(0, 1)[None] for tensor in packed]
