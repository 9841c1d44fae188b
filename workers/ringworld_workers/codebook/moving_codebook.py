"""A codebook that follows the encoder: k-means to start from, moving means, dead codes revived.

A codebook that starts at random collapses: most codes are near nothing, are never chosen, and so
never move. Here each code starts at a centre of what the encoder makes, and one that falls out of
use starts anew at a latent of the present batch.

Legend: M vectors of width L, K codes.
Source of the moving means: van den Oord et al., 1711.00937, appendix A.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringworld_model.vision.codes import fit_centroids

DECAY = 0.97
"""Of the moving counts and sums, a step."""

DEAD_COUNT = 0.05
"""Vectors a step, as a moving mean, below which a code is out of use."""

KMEANS_ITERATIONS = 10


class MovingCodebook:
    """Counts and sums of the vectors that chose each code, and the table that follows from them.

    Attributes:
        table: float32 [K, L], the network's own parameter, changed in place.
        counts: float32 [K].
        sums: float32 [K, L].
    """

    def __init__(self, table: Tensor) -> None:
        """Follow a table; ``start`` fills it."""
        self.table = table.detach()
        self.counts = torch.zeros(len(table), device=table.device)
        self.sums = torch.zeros_like(self.table)

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Put the codes at the centres of vectors by k-means.

        Args:
            vectors: float32 [M, L] in random order, M >= K.
        """
        self.table.copy_(fit_centroids(vectors, len(self.table), KMEANS_ITERATIONS))
        self.counts.fill_(1.0)
        self.sums.copy_(self.table)

    @torch.no_grad()
    def follow(self, vectors: Tensor, codes: Tensor, generator: torch.Generator) -> int:
        """Move each code towards the vectors that chose it, and revive the dead.

        Args:
            vectors: float32 [M, L].
            codes: int64 [M], the code of each.
            generator: CPU; draws where the dead start anew.

        Returns:
            Codes that were revived.
        """
        counts = torch.bincount(codes, minlength=len(self.table)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors.float())
        self.counts.mul_(DECAY).add_(counts, alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(sums, alpha=1 - DECAY)
        dead = (self.counts < DEAD_COUNT).nonzero().squeeze(1)[: len(vectors)]
        chosen = torch.randperm(len(vectors), generator=generator)[: len(dead)]
        self.sums[dead] = vectors[chosen.to(vectors.device)].float()
        self.counts[dead] = 1.0
        self.table.copy_(self.sums / self.counts[:, None])
        return len(dead)
