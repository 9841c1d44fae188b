"""Rotary position embedding, computed from position ids.

No table is kept, so no maximum length exists. Angles are computed in fp64: at position 10^6 an fp32
angle is off by up to 0.03 rad. The cost is one [T, D / 2] table a forward pass, for all layers.

Legend: B rows, T tokens, H heads, D head_dim.
Source: arXiv 2104.09864, equation 34.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringworld_model.config import RopeForm, RopeScaling


def rope_tables(
    position_ids: Tensor,
    head_dim: int,
    rope_theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    Args:
        position_ids: ints [B, T].
        head_dim: D, even.
        rope_theta: base; pair i turns by ``position / rope_theta^(2 i / D)``.
        dtype: of the tables: float32, or float64 for a model in double precision.
        scaling: applied to the frequencies that ``rope_theta`` gives.

    Returns:
        cos and sin, [B, T, 1, D / 2].
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position_ids.device)
    frequencies = rope_theta ** (-pairs / head_dim)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = position_ids[:, :, None, None].double() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide slow pairs' frequencies by the factor; the share of it fades out towards fast pairs.

    Source: the Llama 3.1 release; arXiv 2407.21783, section 3.4.2, for its purpose.
    """
    turns = frequencies * (scaling.original_max_position_embeddings / (2 * math.pi))
    between = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / between).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def reorder_pairs(weight: Tensor, head_dim: int, to: RopeForm) -> Tensor:
    """Move the rows of a query or key projection from the other pairing to this one.

    The heads that come out are the same numbers in another order, so that scores do not change.

    Args:
        weight: [H D, E]; an output row a dim.
        head_dim: D.
        to: ``half`` takes interleaved rows, ``interleaved`` takes those of halves.

    Returns:
        [H D, E], contiguous.
    """
    inner = (2, head_dim // 2) if to == "interleaved" else (head_dim // 2, 2)
    return weight.unflatten(0, (-1, *inner)).transpose(1, 2).flatten(0, 2).contiguous()


def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor, form: RopeForm) -> Tensor:
    """Turn each pair of dims by its position's angle, in the tables' precision.

    Args:
        heads: queries or keys [B, T, H, D], any float.
        cos: [B, T, 1, D / 2].
        sin: [B, T, 1, D / 2].
        form: ``half`` pairs dim i with i + D / 2, ``interleaved`` pairs 2 i with 2 i + 1.

    Returns:
        [B, T, H, D], dtype of ``heads``, contiguous.
    """
    if form == "half":
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    else:
        first, second = heads[..., 0::2], heads[..., 1::2]
        pairs = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pairs, dim=-1).flatten(-2)
    return turned.to(heads.dtype)
