"""The layout that cuts every document by itself, so that no packing puts it out of balance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Chunks(NamedTuple):
    """What a rank holds of a document: two runs of its tokens, all int64 of one shape.

    Attributes:
        local: the rank's tokens before the document.
        near_at: tokens of the document before the near chunk.
        near: tokens of the near chunk.
        far_at: tokens of the document before the far chunk.
        far: tokens of the far chunk.
    """

    local: torch.Tensor
    near_at: torch.Tensor
    near: torch.Tensor
    far_at: torch.Tensor
    far: torch.Tensor


class DocumentZigzag:
    """Every document in 2R nearly equal chunks: rank r holds chunk r and chunk 2R - 1 - r of each.

    The tokens of the row are counted out as cards are: with c = t mod 2R, token t is one more for
    the near chunk of rank c, or from c = R on for the far chunk of rank c - R. That says how long
    the chunks of each document are; which tokens they hold follows from their order, near chunks by
    rank, then far chunks from the last rank back. So a rank holds as many tokens of each document
    as of a striped row, no rank ever gets more than a token ahead of another, and near and far
    chunks get the odd tokens of documents in turn: were it always the same ones, short documents
    would put the ring out of balance.

    What follows the documents is dealt as one more.

    Attributes:
        name: "document_zigzag".
        ring_size: number of ranks, R.
        length: tokens that each rank holds, padding included.
        block_tokens: 1; a document of more lies on several ranks.
        chunks: of each (document, rank), what follows the documents too: int64 [D + 1, R].
    """

    name = "document_zigzag"
    block_tokens = 1

    def __init__(self, document_lengths: Sequence[int], ring_size: int, length: int) -> None:
        """Cut the row.

        Args:
            document_lengths: tokens of each document of the row.
            ring_size: number of ranks.
            length: tokens that each rank holds.
        """
        self.ring_size, self.length = ring_size, length
        bounds = torch.tensor([0, *document_lengths, 0], dtype=torch.int64).cumsum(0)
        bounds[-1] = ring_size * length
        self._starts, self._ends = bounds[:-1], bounds[1:]
        # What each rank's chunks, and all chunks before them, have got at each bound.
        ranks = torch.arange(ring_size + 1)
        rounds = (bounds // (2 * ring_size))[:, None] * ranks
        rest = (bounds % (2 * ring_size))[:, None]
        near = rounds + torch.minimum(rest, ranks)
        far = rounds + torch.minimum((rest - ring_size).clamp(min=0), ranks)
        local = (near + far).diff(dim=1)[:-1]
        near, far = near.diff(dim=0), far.diff(dim=0)
        far_at = (self._ends - self._starts)[:, None] - far[:, 1:]
        near_at = near[:, :-1].contiguous()
        self.chunks = Chunks(local, near_at, near.diff(dim=1), far_at, far.diff(dim=1))

    def local_indices(self, rank: int) -> torch.Tensor:
        """See ``BlockLayout.local_indices``."""
        _, near_at, near, far_at, far = (each[:, rank] for each in self.chunks)
        begin = (torch.stack((near_at, far_at), 1) + self._starts[:, None]).flatten()
        tokens = torch.stack((near, far), 1).flatten()
        begin -= tokens.cumsum(0) - tokens
        return begin.repeat_interleave(tokens, output_size=self.length).add_(
            torch.arange(self.length)
        )

    def tokens_before(
        self, index: torch.Tensor, rank: torch.Tensor, document: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``BlockLayout.tokens_before``; looks up what is not told of the documents."""
        if document is None:
            document = torch.searchsorted(self._ends[:-1], index, right=True)
        local, near_at, near, far_at, far = self._chunks_of(document, rank)
        inside = index - self._starts[document]
        zero = inside.new_zeros(())
        near = (inside - near_at).clamp(zero, near)
        return local + near + (inside - far_at).clamp(zero, far)

    def row_index(self, local: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """See ``BlockLayout.row_index``."""
        # As many tokens of a document as of a striped row, where this would be the token's index.
        striped = local * self.ring_size + rank
        document = torch.searchsorted(self._ends[:-1], striped, right=True)
        before, near_at, near, far_at, _ = self._chunks_of(document, rank)
        inside = local - before
        return self._starts[document] + torch.where(
            inside < near, near_at + inside, far_at + inside - near
        )

    def _chunks_of(self, document: torch.Tensor, rank: torch.Tensor) -> Chunks:
        """The chunks of each document and rank, of the broadcast of both shapes."""
        at = document * self.ring_size + rank
        # As torch's own indexing does, for a fifth of the time: there may be very many.
        found = [
            each.flatten().index_select(0, at.flatten()).view(at.shape) for each in self.chunks
        ]
        return Chunks(*found)
