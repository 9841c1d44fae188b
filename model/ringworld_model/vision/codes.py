"""Codes and the vectors that they stand for: nearest code, k-means, and codes that are in range.

Legend: M vectors of width D, K codes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

TILE_VECTORS = 8_192
"""Vectors compared with the codebook at one time."""

TILE_SCORES = 2**23
"""Scores of vectors against codes held at one time: 32 MiB in float32."""


def nearest_codes(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest code of each vector by L2, and the squared distance to it, in tiles.

    Args:
        vectors: [M, D] floating, or uint8 that stands for 0..1.
        codebook: float32 [K, D], on the same device.

    Returns:
        int64 [M] and float32 [M].
    """
    halved_norms = codebook.square().sum(1) / 2
    codes = torch.empty(len(vectors), dtype=torch.int64, device=codebook.device)
    distances = torch.empty(len(vectors), device=codebook.device)
    tile = max(1, min(TILE_VECTORS, TILE_SCORES // len(codebook)))
    for start in range(0, len(vectors), tile):
        batch = vectors[start : start + tile]
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
        # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2): the bracket alone decides which c is nearest.
        score, code = torch.addmm(-halved_norms, batch, codebook.T).max(1)
        codes[start : start + len(batch)] = code
        distances[start : start + len(batch)] = batch.square().sum(1) - 2 * score
    return codes, distances


def fit_centroids(samples: Tensor, number: int, iterations: int) -> Tensor:
    """Centroids of samples by k-means.

    A code that no sample chose is moved to one of the samples that are described worst, so that
    none stays unused.

    Args:
        samples: float32 [M, D] in random order: the first ones are where k-means starts.
        number: K, at most M.
        iterations: rounds of assignment and update.

    Returns:
        float32 [K, D].
    """
    centroids = samples[:number].clone()
    for _ in range(iterations):
        codes, distances = nearest_codes(samples, centroids)
        counts = torch.bincount(codes, minlength=number)
        sums = torch.zeros_like(centroids).index_add_(0, codes, samples)
        centroids = sums / counts.clamp(min=1)[:, None]
        dead = (counts == 0).nonzero().squeeze(1)
        if len(dead):
            centroids[dead] = samples[distances.topk(len(dead)).indices]
    return centroids


def checked_codes(codes: ArrayLike, codebook_size: int, codes_per_frame: int) -> NDArray[np.int64]:
    """Codes as int64 [F, codes_per_frame], each one in range.

    Raises:
        ValueError: another shape or dtype, or a code that the codebook does not have.
    """
    ids = np.asarray(codes)
    if ids.ndim != 2 or ids.shape[1] != codes_per_frame:
        raise ValueError(
            f"codes have shape {ids.shape}; a frame has {codes_per_frame} of them, so that they "
            f"must be [frames, {codes_per_frame}]"
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"codes are {ids.dtype}; they must be whole numbers")
    bad = np.argwhere((ids < 0) | (ids >= codebook_size))
    if len(bad):
        frame, place = (int(index) for index in bad[0])
        raise ValueError(
            f"code {ids[frame, place]} of frame {frame} is not in 0..{codebook_size - 1}; "
            "leave out eof and eov, and take the codebook that made the codes"
        )
    return ids.astype(np.int64, copy=False)
