"""Work: what each rank of a ring must compute with each rank's keys, counted and cut up.

R ring size, D documents, P pieces (a piece is the part of one document inside one block).
``source`` is the rank whose keys and values are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch

from ringworld_model.ring.layout import Layout
from ringworld_model.ring.rectangle import Rectangle, cover_staircase

Rectangles = tuple[Rectangle, ...]
_DOCUMENTS_AT_ONCE = 1024


def count_work(layout: Layout, document_lengths: Sequence[int]) -> Work:
    """Return the work of a row whose documents follow one another from index 0."""
    lengths = torch.tensor(document_lengths, dtype=torch.int64)
    ends = lengths.cumsum(0)
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

    def __init__(self, layout: Layout, starts: torch.Tensor, ends: torch.Tensor) -> None:
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
        found: list[list[Rectangle]] = [[] for _ in range(size)]
        for keys, first_key, count in zip(
            source[firsts].tolist(), k0[at][firsts].tolist(), of.bincount().tolist(), strict=True
        ):
            found[keys].extend(cover_staircase(list(islice(strips, count)), first_key))
        # The same tokens on both sides: local order is row order, so a document is one square.
        bounds = layout.tokens_before(torch.cat((self.starts[:1], self.ends)), own).tolist()
        found[rank] = [
            Rectangle(start, end, start, end, True)
            for start, end in zip(bounds, bounds[1:], strict=False)
            if start < end
        ]
        return [tuple(rectangles) for rectangles in found]


def group_runs(
    first: torch.Tensor, second: torch.Tensor, second_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of equal (first, second): where each begins, int64 [G], and the run of each, int64."""
    key = first * max(1, second_size) + second
    new = torch.ones(len(key), dtype=torch.bool)
    new[1:] = key[1:] != key[:-1]
    return new.nonzero()[:, 0], new.cumsum(0) - 1


class StripedWork:
    """The same of token t on rank t mod R: each document is one diagonal for every (rank, source).

    Local query i and local key j are tokens i * R + rank and j * R + source, so the key is visible
    from i = j on where source <= rank, and from i = j + 1 on elsewhere.
    """

    def __init__(self, layout: Layout, starts: torch.Tensor, ends: torch.Tensor) -> None:
        """Count the pairs.

        Args:
            layout: a striped one.
            starts: see ``BlockWork``.
            ends: see ``BlockWork``.
        """
        self.layout, self.starts, self.ends = layout, starts, ends
        size = layout.ring_size
        every = torch.arange(size)
        # First local index at or past a document's start and end, by (document, rank).
        self._begin = layout.tokens_before(starts[:, None], every)
        self._end = layout.tokens_before(ends[:, None], every)
        # Rows n = end - begin - later of a diagonal hold n (n + 1) / 2 pairs, and n is -1 or more,
        # so that the sum over the documents needs no table by (document, rank, source). Counted
        # from the document, for its squares to be exact in fp64.
        later, near = self._later(), self._begin[:, -1:]
        begin, end = (self._begin - near).double(), (self._end - near).double()
        linear = end.sum(0)[:, None] - begin.sum(0)[None, :]
        squares = (end**2).sum(0)[:, None] + (begin**2).sum(0)[None, :] - 2 * end.T @ begin
        squares += later * (len(starts) - 2 * linear)
        pairs = (squares + linear - len(starts) * later) / 2
        self.pairs = pairs.to(torch.int64)

    def _later(self) -> torch.Tensor:
        every = torch.arange(self.layout.ring_size)
        return (every[None, :] > every[:, None]).to(torch.int64)

    def diagonals(self) -> list[torch.Tensor]:
        """Rows of every document's diagonal, some documents at once: int64 [D', rank, source]."""
        later = self._later()
        return [
            (end[:, :, None] - begin[:, None, :] - later).clamp(min=0)
            for begin, end in zip(
                self._begin.split(_DOCUMENTS_AT_ONCE),
                self._end.split(_DOCUMENTS_AT_ONCE),
                strict=True,
            )
        ]

    def rectangles(self, rank: int) -> list[Rectangles]:
        """See ``BlockWork.rectangles``."""
        later = self._later()[rank]
        rows = self._end[:, rank, None] - self._begin - later  # [D, source]
        source, document = at = (rows.T > 0).nonzero(as_tuple=True)
        k0, length = self._begin.T[at], rows.T[at]
        q0 = k0 + later[source]
        found = [
            Rectangle(*sides, True)
            for sides in zip(
                q0.tolist(),
                (q0 + length).tolist(),
                k0.tolist(),
                (k0 + length).tolist(),
                strict=True,
            )
        ]
        ends = torch.bincount(source, minlength=self.layout.ring_size).cumsum(0).tolist()
        return [tuple(found[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


Work = BlockWork | StripedWork
"""The visible part of the attention matrix of one row."""
