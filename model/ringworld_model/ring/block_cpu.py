"""CPU block kernel: torch's own flash attention, called with the row's merged lse."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ringworld_model.ring.rectangle import Rectangle

_LARGE = 1024
"""Queries and keys from which half precision is faster than fp32."""
DIAGONAL_ROWS = 256
"""Rows from which a diagonal is cut. The op skips no hidden keys but whole blocks of 512, so that
causal attention of up to 512 tokens costs it as much as all pairs (measured)."""
KEYS_STEP = 16
"""What a cut leaves a multiple of. Other numbers of keys cost the op 3 to 5 % more (measured)."""
# The overloads themselves: looking one up takes as long as a small copy.
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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

    def pieces(
        self, dtype: torch.dtype, rectangle: Rectangle, backward: bool
    ) -> list[tuple[Rectangle, bool]]:
        """See ``BlockKernel.pieces``."""
        half = dtype.itemsize < 4

        def widens(piece: Rectangle) -> bool:
            small = min(piece.q1 - piece.q0, piece.k1 - piece.k0) < _LARGE
            return half and (small or not backward)

        rows = rectangle.q1 - rectangle.q0
        halvings = max(0, rows.bit_length() - DIAGONAL_ROWS.bit_length() + 1)
        leaf = -(-rows // (KEYS_STEP << halvings)) * KEYS_STEP
        return [(piece, widens(piece)) for piece in _halved(rectangle, leaf)]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``BlockKernel.forward``."""
        _check(q, k, v, diagonal)
        out, lse = _FORWARD(*_widened(q, k, v), 0.0, diagonal, scale=scale)
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
        if diagonal or min(q.shape[2], k.shape[2]) < _LARGE:
            grad_out, q, k, v, out = _widened(grad_out, q, k, v, out)
        # The half-precision op reads lse as if it were contiguous.
        lse = lse.contiguous() if q.itemsize < 4 else lse
        dq, dk, dv = _BACKWARD(grad_out, q, k, v, out, lse, 0.0, diagonal, scale=scale)
        return dq, dk, dv


def _halved(rectangle: Rectangle, leaf: int) -> Iterator[Rectangle]:
    """Cut a diagonal into diagonals of up to ``leaf`` rows and the full rectangles below them."""
    start, stop, k0, k1, diagonal = rectangle
    leaves = -(-(stop - start) // leaf)
    if not diagonal or leaves == 1:
        yield rectangle
        return
    rows = (leaves + 1) // 2 * leaf
    yield from _halved(Rectangle(start, start + rows, k0, k0 + rows, True), leaf)
    yield Rectangle(start + rows, stop, k0, k0 + rows, False)
    yield from _halved(Rectangle(start + rows, stop, k0 + rows, k1, True), leaf)


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
