"""Work: what each rank of a ring must compute with each rank's keys, counted and cut up.

R ring size, D documents, P pieces (a piece is the part of one document inside one block).
``source`` is the rank whose keys and values are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch

from ringworld_model.ring.dealt_work import DocumentZigzagWork, StripedWork
from ringworld_model.ring.document_zigzag import DocumentZigzag
from ringworld_model.ring.layout import BlockLayout, Layout
from ringworld_model.ring.rectangle import Rectangles, cover_staircase


def count_work(layout: Layout, document_lengths: Sequence[int]) -> Work:
    """Return the work of a row whose documents follow one another from index 0."""
    lengths = torch.tensor(document_lengths, dtype=torch.int64)
    ends = lengths.cumsum(0)
    if isinstance(layout, DocumentZigzag):
        return DocumentZigzagWork(layout, ends - lengths, ends)
    # One-token blocks would make a piece a token; stripes have a closed form instead.
    kind = StripedWork if layout.name == "striped" else BlockWork
    return kind(layout, ends - lengths, ends)


class Pieces(NamedTuple):
    """Pieces, those of a rank together, and in row order.

    Attributes:
        owner: rank that holds the piece: int64 [P], ascending.
        document: int64 [P].
        begin: row index of the first token: int64 [P].
        length: tokens: int64 [P].
    """

    owner: torch.Tensor
    document: torch.Tensor
    begin: torch.Tensor
    length: torch.Tensor


class BlockWork:
    """The visible part of the attention matrix of one row, in a layout of long blocks.

    Documents are packed from index 0 and a rank's tokens ascend, so the tokens that a rank holds
    before a piece are also the local index at which the piece begins for that rank.

    Attributes:
        layout: how the row is dealt.
        starts: row index where each document begins: int64 [D].
        ends: row index after each document: int64 [D].
        pieces: of all ranks.
        pairs: visible (query, key) pairs: int64 [R, R], indexed (rank, source).
    """

    def __init__(self, layout: BlockLayout, starts: torch.Tensor, ends: torch.Tensor) -> None:
        """Count the pairs.

        Args:
            layout: not a striped one.
            starts: see above.
            ends: see above.
        """
        self.layout, self.starts, self.ends = layout, starts, ends
        total = int(ends[-1]) if len(ends) else 0
        begin = torch.cat((torch.arange(0, total, layout.block_tokens), starts)).unique()
        length = torch.diff(begin, append=torch.tensor([total]))[: len(begin)]
        document = torch.searchsorted(starts, begin, right=True) - 1
        owner, order = layout.owners()[begin // layout.block_tokens].sort(stable=True)
        self.pieces = Pieces(owner, document[order], begin[order], length[order])
        self.pairs = self._count_pairs()

    def _count_pairs(self) -> torch.Tensor:
        size = self.layout.ring_size
        later, seen = self.later_pieces()
        # Whole numbers, exact in fp64, which multiplies and adds faster.
        pairs = torch.zeros(size, size, dtype=torch.float64)
        pairs.index_add_(0, later.owner, seen.double().mul_(later.length[:, None]))
        length = self.pieces.length
        triangles = (length * (length + 1) // 2).double()
        pairs.diagonal().add_(pairs.new_zeros(size).index_add(0, self.pieces.owner, triangles))
        return pairs.to(torch.int64)

    def later_pieces(self) -> tuple[Pieces, torch.Tensor]:
        """The pieces that do not begin their document, so that they see keys of other pieces.

        Returns:
            The pieces; and how many keys of its own document come before each: int64 [P, R], by
            source, made anew, for the table is large.
        """
        every = torch.arange(self.layout.ring_size)
        of = (self.pieces.begin != self.starts[self.pieces.document]).nonzero()[:, 0]
        pieces = Pieces(*(column[of] for column in self.pieces))
        documents, document = pieces.document.unique(return_inverse=True)
        before = self.layout.tokens_before(self.starts[documents, None], every)
        seen = self.layout.tokens_before(pieces.begin[:, None], every)
        return pieces, seen.sub_(before[document])

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The documents of each rank: the rank, int64 [N], ascending, and tokens, int64 [N]."""
        owner, document, _, length = self.pieces
        first, of = group_runs(owner, document, len(self.starts))
        return owner[first], torch.zeros_like(first).index_add_(0, of, length)

    def rectangles(self, rank: int) -> list[Rectangles]:
        """Rectangles of ``rank`` with each source: each visible pair lies in exactly one."""
        layout, size = self.layout, self.layout.ring_size
        every = torch.arange(size)
        own = torch.tensor(rank)
        mine = slice(*torch.searchsorted(self.pieces.owner, torch.stack((own, own + 1))).tolist())
        document, begin = self.pieces.document[mine], self.pieces.begin[mine]
        q0 = layout.tokens_before(begin, own)
        stop = layout.tokens_before(self.ends[document], own)
        k0 = layout.tokens_before(self.starts[document, None], every).T  # [R, P of this rank]
        k1 = layout.tokens_before(begin[:, None], every).T
        # A strip begins where a piece sees more keys than the piece above it, and at least one.
        strip = k1 > k0
        strip[:, 1:] &= (document[1:] != document[:-1]) | (k1[:, 1:] != k1[:, :-1])
        strip[rank] = False
        source, piece = at = strip.nonzero(as_tuple=True)
        # Up to the next strip of the same document, or to the document's end on this rank.
        q1 = stop[piece]
        firsts, of = group_runs(source, document[piece], len(self.starts))
        q1[:-1] = torch.where(of[1:] == of[:-1], q0[piece][1:], q1[:-1])
        strips = zip(q0[piece].tolist(), q1.tolist(), k1[at].tolist(), strict=True)
        sides: list[int] = []
        counts = [0] * size
        for keys, first_key, count in zip(
            source[firsts].tolist(), k0[at][firsts].tolist(), of.bincount().tolist(), strict=True
        ):
            before = len(sides)
            for each in cover_staircase(list(islice(strips, count)), first_key):
                sides.extend(each[:4])
            counts[keys] += (len(sides) - before) // 4
        table = torch.tensor(sides, dtype=torch.int64).view(-1, 4)
        found = [Rectangles(part, False) for part in table.split(counts)]
        # The same tokens on both sides: local order is row order, so a document is one square.
        bounds = layout.tokens_before(torch.cat((self.starts[:1], self.ends)), own)
        squares = torch.stack((bounds[:-1], bounds[1:]), 1).repeat(1, 2)
        found[rank] = Rectangles(squares[bounds[:-1] < bounds[1:]], True)
        return found


def group_runs(
    first: torch.Tensor, second: torch.Tensor, second_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of equal (first, second): where each begins, int64 [G], and the run of each, int64."""
    key = first * max(1, second_size) + second
    new = torch.ones(len(key), dtype=torch.bool)
    new[1:] = key[1:] != key[:-1]
    return new.nonzero()[:, 0], new.cumsum(0) - 1


Work = BlockWork | StripedWork | DocumentZigzagWork
"""The visible part of the attention matrix of one row."""
