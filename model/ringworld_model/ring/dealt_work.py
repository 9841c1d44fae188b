"""Work where every document is dealt to all ranks: one rectangle for each (rank, source).

R ring size, D documents. ``source`` is the rank whose keys and values are at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ringworld_model.ring.document_zigzag import DocumentZigzag
from ringworld_model.ring.layout import BlockLayout
from ringworld_model.ring.rectangle import Rectangles

_DOCUMENTS_AT_ONCE = 1024


class StripedWork:
    """The same of token t on rank t mod R: each document is one diagonal for every (rank, source).

    Local query i and local key j are tokens i * R + rank and j * R + source, so the key is visible
    from i = j on where source <= rank, and from i = j + 1 on elsewhere.
    """

    def __init__(self, layout: BlockLayout, starts: torch.Tensor, ends: torch.Tensor) -> None:
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
        sides = torch.stack((q0, q0 + length, k0, k0 + length), 1)
        counts = torch.bincount(source, minlength=self.layout.ring_size).tolist()
        return [Rectangles(part, True) for part in sides.split(counts)]


Measure = Callable[[torch.Tensor], torch.Tensor]
"""What so many tokens cost, elementwise: int64 -> int64; nothing for none."""


class DocumentZigzagWork:
    """The same of documents in zigzag: a square for each rank, a full rectangle for all else.

    A rank's two chunks of a document are neighbours there, hence the square. Of a later rank's
    document the far queries see all keys, and the near ones none; of an earlier rank's, all queries
    see the near keys, and none the far ones.
    """

    def __init__(self, layout: DocumentZigzag, starts: torch.Tensor, ends: torch.Tensor) -> None:
        """Count the pairs.

        Args:
            layout: of the same documents.
            starts: see ``BlockWork``.
            ends: see ``BlockWork``.
        """
        self.layout, self.starts, self.ends = layout, starts, ends
        # Without what follows the documents.
        self._local, _, self._near, _, self._far = (each[: len(starts)] for each in layout.chunks)
        self.shares = self._near + self._far
        """Tokens of each document on each rank: int64 [D, R]."""
        squares = (self.shares * (self.shares + 1)).sum(0) // 2
        self.pairs = self.sum_products(torch.clone, torch.clone) + squares.diag()

    def sum_products(self, queries: Measure, keys: Measure) -> torch.Tensor:
        """Sum of queries(rows) * keys(columns) over the full rectangles: int64 [R, R], 0 on top.

        Args:
            queries: of a rectangle's queries.
            keys: of its keys.
        """
        far, shares = queries(self._far), queries(self.shares)
        return self.multiply(far, shares, keys(self.shares), keys(self._near))

    def multiply(
        self, far: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, near: torch.Tensor
    ) -> torch.Tensor:
        """Sum of products over the full rectangles: int64 [R, R], 0 on top.

        Args:
            far: of each rank's far queries of each document: [D, R], whole numbers or bool.
            rows: of all of them, which see the near keys of earlier ranks.
            columns: of each source's keys, which later ranks' far queries see.
            near: of its near keys.
        """
        # Exact in fp64, which multiplies and adds faster. No table by (document, rank, source) is
        # made.
        later = far.double().T @ columns.double()
        earlier = rows.double().T @ near.double()
        return (later.triu(1) + earlier.tril(-1)).to(torch.int64)

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where each document begins on each rank, its far chunk begins, and it ends: [D, R]."""
        return self._local, self._local + self._near, self._local + self.shares

    def rectangles(self, rank: int) -> list[Rectangles]:
        """See ``BlockWork.rectangles``."""
        sides, some = self.sides(rank)
        parts = torch.stack(sides, 2)[some].split(some.sum(1).tolist())
        return [Rectangles(part, source == rank) for source, part in enumerate(parts)]

    def sides(self, rank: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The rectangles of ``rank``: q0, q1, k0, k1, int64 [R, D], and which hold any pair."""
        begin, near, end = self.bounds
        later = torch.arange(self.layout.ring_size) > rank
        q0 = torch.where(later, near[:, rank, None], begin[:, rank, None]).T
        k1 = torch.where(later, end, near)
        k1[:, rank] = end[:, rank]
        q1, k0, k1 = end[:, rank].expand_as(q0), begin.T, k1.T
        return (q0, q1, k0, k1), (q0 < q1) & (k0 < k1)
