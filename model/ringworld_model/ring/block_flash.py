"""The flash ring backend: full rectangles and token-causal squares through variable-length ops.

B rows, T local tokens, H query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringworld_model.ring.flash_ops import HEAD_DIMS, choose_op
from ringworld_model.ring.kernel import RowGroup, accumulator
from ringworld_model.ring.merge import merge_
from ringworld_model.ring.varlen import Tokens, varlen_calls
from ringworld_model.ring.varlen_op import VarlenOp


class FlashKernel:
    """A ``RingKernel`` of variable-length flash calls, merged and summed in fp32.

    Each call's out, dq, dk and dv come rounded to the inputs' dtype, as the ops give them. The
    ops sum dq in an order of their own, so its bits repeat only under
    ``torch.use_deterministic_algorithms(True)``.
    """

    head_dims = HEAD_DIMS

    def __init__(self, op: VarlenOp | None = None) -> None:
        """Use ``op``, or the best that runs on the tensors' device where it is None."""
        self._op = op

    def forward(
        self, rank: int, rows: Sequence[RowGroup], q: torch.Tensor, scale: float
    ) -> _Forward:
        """See ``RingKernel``."""
        return _Forward(self._op_for(q), rank, rows, q, scale)

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
        return _Backward(self._op_for(q), rank, rows, (grad_out, q, out, lse), scale)

    def _op_for(self, q: torch.Tensor) -> VarlenOp:
        return self._op or choose_op(q.device, q.dtype, q.shape[-1]).op


class _Forward:
    def __init__(
        self, op: VarlenOp, rank: int, rows: Sequence[RowGroup], q: torch.Tensor, scale: float
    ) -> None:
        self._op, self._rank, self._q, self._scale = op, rank, q, scale
        self._parts = [(group, _Merged(q[group.rows])) for group in rows]

    def step(self, step: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ``ForwardPass``."""
        for (rows, plan), merged in self._parts:
            q_rows, k_rows, v_rows = self._q[rows], k[rows], v[rows]
            for queries, keys, sequences in varlen_calls(
                plan, self._rank, step, len(q_rows), q_rows.device
            ):
                merged.add(
                    queries,
                    *self._op.forward(
                        queries.packed(q_rows),
                        keys.packed(k_rows),
                        keys.packed(v_rows),
                        sequences,
                        self._scale,
                    ),
                )

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``ForwardPass``."""
        outs, lses = zip(*(merged.finish() for _, merged in self._parts), strict=True)
        return _joined(outs), _joined(lses)


class _Merged:
    """out and lse of some rows so far."""

    def __init__(self, q: torch.Tensor) -> None:
        self._q = q
        self._exact = accumulator(q.dtype)
        self._out: torch.Tensor | None = None  # [B, T, H, D], exact from the second call on
        self._lse = q.new_empty(0)  # [B, H, T], exact

    def add(self, queries: Tokens, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge a call's out [B * tokens, H, D] and lse [H, B * tokens]."""
        batch, length, heads, _ = self._q.shape
        out = out.unflatten(0, (batch, -1))
        lse = lse.unflatten(1, (batch, -1)).transpose(0, 1)
        if self._out is None and out.shape[1] == length:
            # The first call saw every query: nothing to merge, and mostly nothing to convert.
            self._out, self._lse = out, lse.contiguous()
            return
        if self._out is None:
            self._out = torch.zeros(self._q.shape, dtype=self._exact, device=self._q.device)
            self._lse = self._q.new_full((batch, heads, length), -torch.inf, dtype=self._exact)
        self._out = self._out.to(self._exact)
        so_far = queries.of(self._out), queries.of(self._lse, dim=2)
        merge_(so_far[0].transpose(1, 2), so_far[1], out.transpose(1, 2), lse)
        if queries.index is not None:
            self._out.index_copy_(1, queries.index, so_far[0])
            self._lse.index_copy_(2, queries.index, so_far[1])

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [B, T, H, D] in q's dtype and lse [B, H, T]."""
        if self._out is None:
            batch, length, heads, _ = self._q.shape
            lse = self._q.new_full((batch, heads, length), -torch.inf, dtype=self._exact)
            return torch.zeros_like(self._q), lse
        return self._out.to(self._q.dtype), self._lse


class _Backward:
    def __init__(
        self,
        op: VarlenOp,
        rank: int,
        rows: Sequence[RowGroup],
        saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
    ) -> None:
        self._op, self._rank, self._rows, self._scale = op, rank, rows, scale
        self._grad, self._q, self._out, self._lse = saved
        self._dq = torch.zeros(self._q.shape, dtype=self._lse.dtype, device=self._q.device)

    def step(
        self, step: int, k: torch.Tensor, v: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> None:
        """See ``BackwardPass``."""
        for rows, plan in self._rows:
            num_rows = rows.stop - rows.start
            for queries, keys, sequences in varlen_calls(
                plan, self._rank, step, num_rows, self._q.device
            ):
                lse = queries.of(self._lse[rows], dim=2).transpose(0, 1).flatten(1)
                shares = self._op.backward(
                    queries.packed(self._grad[rows]),
                    queries.packed(self._q[rows]),
                    keys.packed(k[rows]),
                    keys.packed(v[rows]),
                    queries.packed(self._out[rows]),
                    lse.contiguous(),
                    sequences,
                    self._scale,
                )
                queries.add_(self._dq[rows], shares[0])
                keys.add_(dk[rows], shares[1])
                keys.add_(dv[rows], shares[2])

    def finish(self) -> torch.Tensor:
        """See ``BackwardPass``."""
        return self._dq.to(self._q.dtype)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
