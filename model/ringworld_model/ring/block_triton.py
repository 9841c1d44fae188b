"""Triton backend: our own kernels, one launch a ring step and row group, for any layout.

B rows, T local tokens, R ring size, H query heads, Hkv key heads, D head width. Triton is imported
when a pass begins, so that this module imports without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ringworld_model.ring.kernel import RowGroup
from ringworld_model.ring.tiles import TileTable, key_table, query_table
from ringworld_model.ring.triton_launch import Launch, block_width, capability_of, launches

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DELTA_TILE = 64
_L2_BYTES = 32 << 20
"""What the heads worked on at one time may share: most of an H100's L2 cache of 50 MB."""


class TritonKernel:
    """A ``RingKernel`` in Triton for bf16, fp16 and fp32 on CUDA devices from capability 8.0 on."""

    head_dims = range(1, 129)

    def forward(
        self, rank: int, rows: Sequence[RowGroup], q: torch.Tensor, scale: float
    ) -> TritonForward:
        """See ``RingKernel.forward``."""
        return TritonForward(rank, rows, q, scale)

    def backward(
        self,
        rank: int,
        rows: Sequence[RowGroup],
        grad_out: torch.Tensor,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> TritonBackward:
        """See ``RingKernel.backward``."""
        return TritonBackward(rank, rows, grad_out, q, out, lse, scale)


class TritonForward:
    """A ``ForwardPass``: the running out and lse are merged inside the kernel."""

    def __init__(self, rank: int, rows: Sequence[RowGroup], q: torch.Tensor, scale: float) -> None:
        """See ``RingKernel.forward``."""
        _check(q, rows)
        self._rank, self._rows, self._q, self._scale = rank, rows, q, float(scale)
        self._launch = launches(q.shape[-1], q.dtype, capability_of(q.device)).forward
        # Step 0 writes every element: each token sees itself, and padding gets its zeros.
        self._out = torch.empty(q.shape, dtype=_sums(q, rows), device=q.device)
        batch, length, heads, _ = q.shape
        self._lse = q.new_empty((batch, heads, length), dtype=torch.float32)

    def step(self, step: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ``ForwardPass.step``."""
        from ringworld_model.ring.triton_forward import attend_forward

        launch, shape = self._launch, (self._launch.tile_q, self._launch.tile_k)
        for rows, plan in self._rows:
            table = query_table(plan, self._rank, step, shape, self._q.device)
            if len(table.visits) == 0:
                continue
            q, out, keys, values = self._q[rows], self._out[rows], k[rows], v[rows]
            batch, length, heads, _ = q.shape
            group = heads // k.shape[2]
            at_once = group * _heads_at_once(keys, batch * k.shape[2])
            with _on(q.device):
                attend_forward[(len(table.visits) * batch * heads,)](
                    *(q, keys, values, out, self._lse[rows]),
                    *(table.visits, table.masked, table.ranges),
                    abs(self._scale) * math.log2(math.e),
                    *(len(table.visits), length, batch * heads, heads, group, at_once),
                    *(*_strides(q), *_strides(keys), *_strides(values), *_strides(out)),
                    FIRST=step == 0,
                    NEGATE=self._scale < 0,
                    **_constants(q, launch),
                )

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``ForwardPass.finish``."""
        return self._out.to(self._q.dtype), self._lse


class TritonBackward:
    """A ``BackwardPass``: each step adds to dk, dv and dq inside the kernels."""

    def __init__(
        self,
        rank: int,
        rows: Sequence[RowGroup],
        grad_out: torch.Tensor,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> None:
        """See ``RingKernel.backward``."""
        from ringworld_model.ring.triton_backward_queries import sum_delta

        _check(q, rows)
        self._rank, self._rows, self._scale = rank, rows, float(scale)
        self._grad_out, self._q, self._lse = grad_out, q, lse.contiguous()
        self._launches = launches(q.shape[-1], q.dtype, capability_of(q.device))
        self._dq = torch.empty(q.shape, dtype=_sums(q, rows), device=q.device)
        self._delta = torch.empty_like(self._lse)
        batch, length, heads, width = q.shape
        with _on(q.device):
            sum_delta[(-(-length // _DELTA_TILE) * batch * heads,)](
                *(grad_out, out, self._delta, length, heads),
                *(*_strides(grad_out), *_strides(out)),
                D=width,
                BLOCK_D=block_width(width),
                TILE=_DELTA_TILE,
                UPCAST=q.device.type == "cpu",
            )

    def step(
        self, step: int, k: torch.Tensor, v: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> None:
        """See ``BackwardPass.step``."""
        for rows, plan in self._rows:
            by_key, by_query = self._launches.keys, self._launches.queries
            where = (plan, self._rank, step)
            device = self._q.device
            keys = key_table(*where, (by_key.tile_k, by_key.tile_q), device)
            if len(keys.visits):
                self._keys_step(step, RowGroup(rows, plan), keys, k, v, dk, dv)
            queries = query_table(*where, (by_query.tile_q, by_query.tile_k), device)
            if len(queries.visits):
                self._queries_step(step, RowGroup(rows, plan), queries, k, v)

    def finish(self) -> torch.Tensor:
        """See ``BackwardPass.finish``."""
        return self._dq.to(self._q.dtype)

    def _keys_step(
        self,
        step: int,
        group: RowGroup,
        table: TileTable,
        k: torch.Tensor,
        v: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> None:
        from ringworld_model.ring.triton_backward_keys import attend_backward_keys

        rows, plan = group
        grad, q, lse, delta = (
            tensor[rows] for tensor in (self._grad_out, self._q, self._lse, self._delta)
        )
        k, v, dk, dv = (tensor[rows] for tensor in (k, v, dk, dv))
        batch, length, heads, _ = k.shape
        members = q.shape[2] // heads
        at_once = max(1, _heads_at_once(q, batch * q.shape[2]) // members)
        with _on(q.device):
            attend_backward_keys[(len(table.visits) * batch * heads,)](
                *(grad, q, k, v, lse, delta, dk, dv),
                *(table.visits, table.masked, table.ranges),
                self._scale,
                *(len(table.visits), length, batch * heads, heads, members, at_once),
                *(*_strides(grad), *_strides(q), *_strides(k), *_strides(v)),
                *(*_strides(dk), *_strides(dv)),
                **_constants(q, self._launches.keys),
            )

    def _queries_step(
        self, step: int, group: RowGroup, table: TileTable, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        from ringworld_model.ring.triton_backward_queries import attend_backward_queries

        rows, plan = group
        grad, q, lse, delta, dq = (
            tensor[rows] for tensor in (self._grad_out, self._q, self._lse, self._delta, self._dq)
        )
        k, v = k[rows], v[rows]
        batch, length, heads, _ = q.shape
        members = heads // k.shape[2]
        at_once = members * _heads_at_once(k, batch * k.shape[2])
        with _on(q.device):
            attend_backward_queries[(len(table.visits) * batch * heads,)](
                *(grad, q, k, v, lse, delta, dq),
                *(table.visits, table.masked, table.ranges),
                self._scale,
                *(len(table.visits), length, batch * heads, heads, members, at_once),
                *(*_strides(grad), *_strides(q), *_strides(k), *_strides(v), *_strides(dq)),
                FIRST=step == 0,
                **_constants(q, self._launches.queries),
            )


def _check(q: torch.Tensor, rows: Sequence[RowGroup]) -> None:
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"attention.backend='triton' takes bfloat16, float16 and float32, not {q.dtype}"
        )
    if q.shape[-1] not in TritonKernel.head_dims:
        raise ValueError(
            f"attention.backend='triton' takes a head_dim of 1 to {TritonKernel.head_dims[-1]}, "
            f"not {q.shape[-1]}; use more heads"
        )
    if any(plan.ring_length != q.shape[1] for _, plan in rows):
        raise ValueError(
            f"q holds {q.shape[1]} tokens a row; its plans, {rows[0].plan.ring_length}"
        )


def _sums(q: torch.Tensor, rows: Sequence[RowGroup]) -> torch.dtype:
    """What out and dq add up in: fp32, but where there is only one step nothing is added up."""
    return q.dtype if rows[0].plan.ring_size == 1 else torch.float32


def _heads_at_once(shared: torch.Tensor, heads: int) -> int:
    """Heads whose two tensors like ``shared``, [B, T, heads, D], fit the L2 cache together."""
    a_head = 2 * shared.shape[1] * shared.shape[3] * shared.itemsize
    return min(max(1, _L2_BYTES // a_head), heads)


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides of B, T and heads of [B, T, heads, D]."""
    batch, tokens, heads, _ = tensor.stride()
    return batch, tokens, heads


def _constants(q: torch.Tensor, launch: Launch) -> dict[str, Any]:
    return {
        "D": q.shape[-1],
        "BLOCK_D": block_width(q.shape[-1]),
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.tile_k,
        "UPCAST": q.device.type == "cpu",
        # Three passes of TF32 keep what one would round away.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def _on(device: torch.device) -> torch.cuda.device:
    """Make ``device`` the current one: Triton launches there."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
