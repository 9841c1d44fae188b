"""CPU block kernel: torch's own flash attention, called with the row's merged lse."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ringworld_model.ring.rectangle import Rectangle

_LARGE = 1024
"""Queries and keys from which half precision is faster than fp32."""


class CpuKernel:
    """A ``BlockKernel`` for fp64, fp32, bf16 and fp16 on CPU.

    The op's traps, and what keeps out of them: it ends the process on zero queries or keys and
    gives lse 0 for a fully masked row (a plan has no empty rectangle and no mask); its causal mask
    starts at the top left (diagonals are square); a strided last dim is silently read wrong.

    Half types are computed in fp32, but for the backward pass of large rectangles. The op's own
    half-precision results are rounded once a block, and over a ring of small blocks those roundings
    add up to more than one full-sequence call makes. In the forward pass fp32 costs no more time
    (AVX512); in the backward pass it costs 1.4 times as much for large rectangles, and no more for
    small ones. Most of a full-sequence call's error arises at the diagonal, where few keys share
    large weights: with that in fp32, the rest in half precision leaves the whole row's gradients
    with 0.2 to 0.8 of the error of one half-precision call (measured).
    """

    head_dims = range(1, 1025)

    def widens(self, dtype: torch.dtype, rectangle: Rectangle, backward: bool) -> bool:
        """See ``BlockKernel.widens``."""
        sides = rectangle.q1 - rectangle.q0, rectangle.k1 - rectangle.k0
        return dtype.itemsize < 4 and (not backward or min(sides) < _LARGE)

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
        if q.itemsize >= 4 or min(q.shape[2], k.shape[2]) < _LARGE:
            dq, dk, dv = op(*_widened(grad_out, q, k, v, out), lse, 0.0, diagonal, scale=scale)
            return dq, dk, dv
        if not diagonal:
            dq, dk, dv = op(grad_out, q, k, v, out, lse.contiguous(), 0.0, False, scale=scale)
            return dq, dk, dv
        sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (q, k, v)]
        for q0, q1, k0, k1, square in _halved(0, q.shape[2]):
            queries, keys = (..., slice(q0, q1), slice(None)), (..., slice(k0, k1), slice(None))
            part = [grad_out[queries], q[queries], k[keys], v[keys], out[queries]]
            part = _widened(*part) if square else part
            part_lse = lse[..., q0:q1].contiguous()
            shares = op(*part, part_lse, 0.0, square, scale=scale)
            for total, where, share in zip(sums, (queries, keys, keys), shares, strict=True):
                total[where].add_(share)
        return sums[0], sums[1], sums[2]


def _halved(start: int, stop: int) -> Iterator[Rectangle]:
    """Cut a diagonal into small diagonals and the large full rectangles below them."""
    if stop - start < 2 * _LARGE:
        yield Rectangle(start, stop, start, stop, True)
        return
    middle = (start + stop) // 2
    yield from _halved(start, middle)
    yield Rectangle(middle, stop, start, middle, False)
    yield from _halved(middle, stop)


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
