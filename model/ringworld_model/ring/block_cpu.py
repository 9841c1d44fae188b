"""CPU block kernel: torch's own flash attention, called with the row's merged lse."""

from __future__ import annotations

import torch


class CpuKernel:
    """A ``BlockKernel`` for fp64, fp32, bf16 and fp16 on CPU.

    The op's traps, and what keeps out of them: it ends the process on zero queries or keys and
    gives lse 0 for a fully masked row (a plan has no empty rectangle and no mask); its causal mask
    starts at the top left (diagonals are square); a strided last dim is silently read wrong.

    Half types are computed in fp32. The op's own half-precision results are rounded once a block,
    and over a ring those roundings add up to more than one full-sequence call makes; with AVX512
    fp32 costs 0.4 to 1.2 times as much time, least for the small blocks of packed documents.
    """

    head_dims = range(1, 1025)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``BlockKernel.forward``."""
        _check(q, k, v, diagonal)
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(*_widened(q, k, v), 0.0, diagonal, scale=scale)
        return out, lse

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
        """See ``BlockKernel.backward``."""
        _check(q, k, v, diagonal)
        if out.dtype != q.dtype or grad_out.dtype != q.dtype:
            raise ValueError(
                f"out is {out.dtype} and grad_out {grad_out.dtype}; both must be {q.dtype}, as q is"
            )
        if out.stride(-1) != 1 or grad_out.stride(-1) != 1:
            raise ValueError("out and grad_out need a contiguous last dim")
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = op(*_widened(grad_out, q, k, v, out), lse, 0.0, diagonal, scale=scale)
        return dq, dk, dv


def _widened(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor if tensor.itemsize >= 4 else tensor.to(torch.float32) for tensor in tensors]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: bool) -> None:
    queries, keys = q.shape[2], k.shape[2]
    if queries == 0 or keys == 0:
        raise ValueError(f"a block needs queries and keys, got {queries} and {keys}")
    if diagonal and queries != keys:
        raise ValueError(f"a diagonal block is square, got {queries} queries and {keys} keys")
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("q, k and v need a contiguous last dim")
