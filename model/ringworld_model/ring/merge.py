"""Merging partial attention: two softmaxes over disjoint keys become the softmax over both."""

from __future__ import annotations

import torch


def merge_(
    out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor
) -> None:
    """Merge a block's result into the running ``out`` and ``lse``, in place.

    A row without any key so far has out 0 and lse -inf; merging two such rows leaves it so.

    Args:
        out: [B, H, T, D], the accumulator's dtype (fp32, or fp64 for fp64 inputs).
        lse: [B, H, T], the accumulator's dtype.
        block_out: [B, H, T, D], any float.
        block_lse: [B, H, T], the accumulator's dtype.

    Source: arXiv 2310.01889, section 3, in the form out += sigmoid(block_lse - lse) * difference.
    """
    # (-inf) - (-inf) would be NaN, where the block adds nothing.
    weight = (block_lse - lse.clamp(min=torch.finfo(lse.dtype).min)).sigmoid_()
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze_(-1))
    torch.logaddexp(lse, block_lse, out=lse)
