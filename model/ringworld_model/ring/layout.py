"""Layouts: which tokens of a row each rank of a ring holds.

All but one cut the row into equal blocks, whatever its documents, and deal them to the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

from ringworld_model.ring.document_zigzag import DocumentZigzag

LAYOUTS = ("contiguous", "zigzag", "document_zigzag", "block_cyclic", "striped")
"""Every layout; "auto" tries them in this order, and the first of equals wins."""

BLOCK_CYCLIC_TOKENS = 128
"""Tokens of a block of the block-cyclic layout: the tile of the attention kernels."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Equal blocks, dealt to the ranks, each rank's in ascending order.

    Blocks reach past the row's end where its length does not divide: those indices are padding.

    Attributes:
        name: one of ``LAYOUTS``.
        ring_size: number of ranks.
        block_tokens: tokens of a block; a document inside one is on one rank.
        blocks_per_rank: blocks that each rank holds.
    """

    name: str
    ring_size: int
    block_tokens: int
    blocks_per_rank: int

    @property
    def length(self) -> int:
        """Tokens that each rank holds, padding included."""
        return self.block_tokens * self.blocks_per_rank

    def owners(self) -> torch.Tensor:
        """Rank that holds each block: int64 [ring_size * blocks_per_rank], in row order."""
        ranks = torch.arange(self.ring_size)
        if self.name == "zigzag":
            return torch.cat((ranks, ranks.flip(0)))
        return ranks.repeat(self.blocks_per_rank)

    def local_indices(self, rank: int) -> torch.Tensor:
        """Row index of each token that ``rank`` holds: int64 [length], ascending."""
        if self.name == "zigzag":
            blocks = torch.tensor([rank, 2 * self.ring_size - 1 - rank])
        else:
            blocks = rank + self.ring_size * torch.arange(self.blocks_per_rank)
        return (blocks[:, None] * self.block_tokens + torch.arange(self.block_tokens)).flatten()

    def tokens_before(
        self, index: torch.Tensor, rank: torch.Tensor, document: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens before a row index that a rank holds: int64, the broadcast of all shapes.

        Args:
            index: of the row, up to its end.
            rank: whose tokens.
            document: in which the index is, or which ends there; blocks need not know.
        """
        tokens, last = self.block_tokens, 2 * self.ring_size - 1
        if self.name == "zigzag":
            near = (index - rank * tokens).clamp(0, tokens)
            return near + (index - (last - rank) * tokens).clamp(0, tokens)
        cycle = tokens * self.ring_size
        rounds = index.div(cycle, rounding_mode="floor")
        return rounds * tokens + (index - rounds * cycle - rank * tokens).clamp(0, tokens)

    def row_index(self, local: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """Row index of a rank's local token: int64, the broadcast of both shapes."""
        turn = local.div(self.block_tokens, rounding_mode="floor")
        if self.name == "zigzag":
            block = torch.where(turn > 0, 2 * self.ring_size - 1 - rank, rank)
        else:
            block = turn * self.ring_size + rank
        return block * self.block_tokens + local - turn * self.block_tokens


Layout = BlockLayout | DocumentZigzag
"""How one row is dealt to the ranks."""


def build_layout(
    name: str,
    document_lengths: Sequence[int],
    context_length: int,
    ring_size: int,
    multiple: int = 1,
) -> Layout:
    """Return the layout ``name`` of a row of ``context_length`` tokens over ``ring_size`` ranks.

    Args:
        name: one of ``LAYOUTS``.
        document_lengths: tokens of each document; they follow one another from index 0.
        context_length: tokens of the whole row, any length from 1.
        ring_size: number of ranks, from 1.
        multiple: each rank's tokens are padded to a multiple of it, from 1.

    Raises:
        ValueError: no such layout.
    """
    if name == "contiguous":
        return BlockLayout(name, ring_size, _padded(context_length, ring_size, multiple), 1)
    if name == "zigzag":
        of_a_block = multiple // gcd(multiple, 2)
        return BlockLayout(name, ring_size, _padded(context_length, 2 * ring_size, of_a_block), 2)
    if name == "document_zigzag":
        length = _padded(context_length, ring_size, multiple)
        return DocumentZigzag(document_lengths, ring_size, length)
    if name == "block_cyclic":
        tokens = BLOCK_CYCLIC_TOKENS
        blocks = _padded(context_length, tokens * ring_size, multiple // gcd(multiple, tokens))
        return BlockLayout(name, ring_size, tokens, blocks)
    if name == "striped":
        return BlockLayout(name, ring_size, 1, _padded(context_length, ring_size, multiple))
    raise ValueError(
        f"attention.layout={name!r} is unknown; choose auto or one of {', '.join(LAYOUTS)}"
    )


def _padded(whole: int, parts: int, multiple: int) -> int:
    """What each of ``parts`` equal parts of ``whole`` holds, in multiples."""
    return -(-whole // (parts * multiple)) * multiple
