"""Attention of some queries to one piece of the cache, added to what they have seen so far.

H query heads, Hkv key heads, Q queries, K keys, D head width. Sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.kernel import accumulator
from ringworld_model.ring.merge import merge_
from ringworld_model.ring.rectangle import Rectangle

_CPU = CpuKernel()
_HALF_KEYS = 4096
"""Keys at a time where the CPU widens them to fp32: the copy must not grow with the cache."""
_FLASH_WIDTHS = range(8, 257, 8)


class Partial:
    """out and lse of queries over the keys that they have met; mergeable with another's.

    Attributes:
        out: [1, H, Q, D].
        lse: [1, H, Q], -inf where a query has met no key.
    """

    def __init__(self, heads: int, queries: int, width: int, like: Tensor) -> None:
        """Begin with no keys; dtype and device follow ``like``."""
        exact = accumulator(like.dtype)
        self.out = like.new_zeros((1, heads, queries, width), dtype=exact)
        self.lse = like.new_full((1, heads, queries), -torch.inf, dtype=exact)
        self._all, self._fresh = slice(0, queries), True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, at: slice | Tensor, diagonal: bool, scale: float
    ) -> None:
        """Let the queries ``at`` see these keys.

        Args:
            q: [1, H, Q', D], the queries at ``at``.
            k: [1, Hkv, K, D].
            v: [1, Hkv, K, D].
            at: a slice of the queries, or int64 indices.
            diagonal: query i sees keys 0 to i; Q' = K.
            scale: factor of the scores.
        """
        keys, on_cpu = k.shape[2], k.device.type == "cpu"
        if diagonal and on_cpu:
            # Its kernel does not skip what a long diagonal hides.
            for piece, _ in _CPU.pieces(k.dtype, Rectangle(0, keys, 0, keys, True), False):
                rows, columns = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
                block = _block(
                    q[:, :, rows], k[:, :, columns], v[:, :, columns], piece.diagonal, scale
                )
                self._merge(_within(at, rows), *block)
            return
        step = _HALF_KEYS if on_cpu and k.dtype.itemsize < 4 else keys
        for start in range(0, keys, step):
            columns = slice(start, start + step)
            self._merge(at, *_block(q, k[:, :, columns], v[:, :, columns], diagonal, scale))

    def merge(self, out: Tensor, lse: Tensor) -> None:
        """Add another's sums over other keys, for all queries."""
        self._merge(self._all, out, lse)

    def _merge(self, at: slice | Tensor, out: Tensor, lse: Tensor) -> None:
        fresh, self._fresh = self._fresh, False
        if fresh and isinstance(at, slice) and at == self._all:
            self.out, self.lse = out.to(self.out.dtype), lse.to(self.lse.dtype)
            return
        if isinstance(at, slice):
            merge_(self.out[:, :, at], self.lse[:, :, at], out, lse)
            return
        so_far = self.out.index_select(2, at), self.lse.index_select(2, at)
        merge_(*so_far, out, lse)
        self.out.index_copy_(2, at, so_far[0])
        self.lse.index_copy_(2, at, so_far[1])


def _within(at: slice | Tensor, part: slice) -> slice | Tensor:
    if isinstance(at, slice):
        return slice(at.start + part.start, at.start + part.stop)
    return at[part]


def _block(q: Tensor, k: Tensor, v: Tensor, diagonal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out [1, H, Q, D], any float, and lse [1, H, Q] of one kernel call."""
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    if diagonal:
        if groups > 1 and q.device.type != "cpu":
            k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
        return _call(q, k, v, True, scale)
    # Queries of the heads that share a key head stand side by side: it is read once for all.
    queries = q.shape[2]
    q = q.unflatten(1, (-1, groups)).flatten(2, 3)
    out, lse = _call(q, k, v, False, scale)
    out = out.unflatten(2, (groups, queries)).reshape(1, heads, queries, -1)
    return out, lse.unflatten(2, (groups, queries)).reshape(1, heads, queries)


def _call(q: Tensor, k: Tensor, v: Tensor, diagonal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return _CPU.forward(q, k, v, diagonal, scale)
    ops = torch.ops.aten
    if q.dtype.itemsize == 2 and q.shape[-1] in _FLASH_WIDTHS:
        found = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, diagonal, False, scale=scale)
        return found[0], found[1]
    if q.dtype.itemsize <= 4:
        found = ops._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, diagonal, scale=scale
        )
        return found[0], found[1][:, :, : q.shape[2]]
    scores = q @ k.transpose(-1, -2) * scale
    if diagonal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
