"""A flash op of a library behind one shape, and the proof that it is right on a device.

T tokens of all sequences, H query heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ringworld_model.ring.reference import ReferenceKernel
from ringworld_model.ring.varlen import Sequences
from ringworld_model.ring.varlen_op import BlockwiseOp

_PROOF_ERROR = 0.02
"""Norm error over norm that an op may show: bf16 makes 3e-3, a wrong mask or lse 0.1 and more."""

Run = Callable[..., Any]


@dataclass(frozen=True)
class FlashOp:
    """A ``VarlenOp`` of a library.

    Attributes:
        name: of the library.
        run_forward: (q, k, v, sequences, scale) -> (out, lse) as the library gives them.
        run_backward: (grad_out, q, k, v, out, lse, sequences, scale) -> (dq, dk, dv).
        tokens_first: the library's lse is [T, H] and not [H, T]. Documentation disagrees about
            it, so ``prove`` finds out.
    """

    name: str
    run_forward: Run
    run_backward: Run
    tokens_first: bool = False

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``VarlenOp.forward``.

        Raises:
            RuntimeError: out or lse is not of the shape that was proved.
        """
        out, lse = self.run_forward(q, k, v, sequences, scale)
        heads_first = lse.transpose(0, 1) if self.tokens_first and lse.dim() == 2 else lse
        if out.shape != q.shape or heads_first.shape != (q.shape[1], q.shape[0]):
            raise RuntimeError(
                f"{self.name} gives out {tuple(out.shape)} and lse {tuple(lse.shape)} for q "
                f"{tuple(q.shape)}; use attention.backend: triton, or another version"
            )
        return out, heads_first

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
        """See ``VarlenOp.backward``."""
        lse = (lse.transpose(0, 1) if self.tokens_first else lse).contiguous()
        dq, dk, dv = self.run_backward(grad_out, q, k, v, out, lse, sequences, scale)
        return dq, dk, dv


def prove(op: FlashOp, device: torch.device, dtype: torch.dtype, head_dim: int) -> FlashOp:
    """Compare an op with fp64, computed on the CPU, on small problems; find its layout of lse.

    Sequences of 5, 19 and 1 tokens, causal and in full, and sequences of one query each, for which
    libraries have ways of their own. The backward pass gets an out and an lse that are not the
    forward pass's own, as a ring gives it.

    Returns:
        The op, with ``tokens_first`` as it is.

    Raises:
        ValueError: an unknown shape, or a wrong number.
    """
    generator = torch.Generator().manual_seed(0)
    reference, scale = BlockwiseOp(ReferenceKernel()), head_dim**-0.5
    several, single = torch.tensor([0, 5, 24, 25]), torch.arange(4)
    for causal, name, queries, keys in (
        (True, "causal", several, several),
        (False, "full", several, several),
        (True, "causal one-token", single, single),
        (False, "full one-query", single, several),
    ):
        total = int(queries[-1])
        longest_queries, longest_keys = (int(of.diff().max()) for of in (queries, keys))
        q, grad_out, k, v = (
            torch.randn(int(of[-1]), heads, head_dim, generator=generator).to(dtype)
            for of, heads in ((queries, 4), (queries, 4), (keys, 2), (keys, 2))
        )
        here = Sequences(queries.int(), keys.int(), longest_queries, longest_keys, causal)
        out, lse = reference.forward(q, k, v, here, scale)
        # As if keys elsewhere weighed as much as all keys here, and held zeros.
        saved, saved_lse = (out / 2).to(dtype), (lse + 0.6931).float()
        grads = reference.backward(grad_out, q, k, v, saved, saved_lse, here, scale)
        wanted = (out, lse, *grads)

        there = here._replace(cu_queries=queries.int().to(device), cu_keys=keys.int().to(device))
        q, grad_out, k, v, saved, saved_lse = (
            of.to(device) for of in (q, grad_out, k, v, saved, saved_lse)
        )
        lse = op.run_forward(q, k, v, there, scale)[1]
        if lse.shape not in ((4, total), (total, 4)):
            raise ValueError(f"lse has the unknown shape {tuple(lse.shape)}")
        op = replace(op, tokens_first=lse.shape[0] == total)
        grads = op.backward(grad_out, q, k, v, saved, saved_lse, there, scale)
        got = (*op.forward(q, k, v, there, scale), *grads)
        for which, one, other in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
            error = _norm_error(one.cpu().double(), other.double())
            if not error <= _PROOF_ERROR:
                raise ValueError(f"wrong {which} of {name} sequences, off by {error:.1e}")
    return op


def _norm_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())
