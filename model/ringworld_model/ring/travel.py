"""Travel: which rows of each rank's keys, values and their gradients move where at each ring step.

A rank needs the keys of a document only up to its own last token of that document: a prefix of what
the source rank holds of it. So what several ranks need is the longest of their prefixes, and all of
it follows from where each rank's part of each document ends. Senders and receivers compute the same
from the plan alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ringworld_model.ring.layout import Layout

Spans = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of local rows, ascending, apart, and none of them empty."""


class Travel(NamedTuple):
    """What one rank sends and receives, each by ring step; rows are of the rank they belong to.

    At step t the rank has the keys of source (rank - t) mod R. Gradients of a source's keys ride
    along from step 1, for as long as later ranks add to them, and go home straight from the last
    that does. A source's own share never leaves it.

    Attributes:
        keys_in: rows of the source's K and V that the previous rank has sent for this step.
        keys_out: rows of them that go on to the next rank; some later rank needs them.
        gradients_in: rows of the source's dK and dV that come with the previous rank's share.
        gradients_out: rows that go on to the next rank, this rank's share added.
        home_out: rows that go to the source, complete but for the source's own share.
        home_in: rows of this rank's own keys whose gradients rank + t sends home.
    """

    keys_in: tuple[Spans, ...]
    keys_out: tuple[Spans, ...]
    gradients_in: tuple[Spans, ...]
    gradients_out: tuple[Spans, ...]
    home_out: tuple[Spans, ...]
    home_in: tuple[Spans, ...]


def plan_travel(layout: Layout, document_lengths: tuple[int, ...], rank: int) -> Travel:
    """Return what ``rank`` sends and receives for one row.

    Args:
        layout: how the row is dealt to the ranks.
        document_lengths: they follow one another from index 0.
        rank: this rank.
    """
    size = layout.ring_size
    lengths = torch.tensor(document_lengths, dtype=torch.int64)
    ends = lengths.cumsum(0)
    starts = ends - lengths
    every = torch.arange(size)
    # [D, R]: one past the last token of each document that each rank holds; the document's start
    # where it holds none. The keys that a rank sees of a document are those before this index.
    held = layout.tokens_before(ends[:, None], every)
    last = torch.where(
        held > layout.tokens_before(starts[:, None], every),
        layout.row_index((held - 1).clamp(min=0), every) + 1,
        starts[:, None],
    )
    # Column j: the furthest of j + 1 ranks: from this one onward, from the next one onward, and
    # from the one before this backward.
    onward = last[:, (rank + every) % size].cummax(1).values
    beyond = last[:, (rank + 1 + every) % size].cummax(1).values
    before = last[:, (rank - 1 - every) % size].cummax(1).values
    # Column j: the furthest of the ranks `rank + j` to `rank + R - 1`.
    rest = last[:, (rank + every) % size].flip(1).cummax(1).values.flip(1)

    def spans(source: int, low: torch.Tensor, high: torch.Tensor) -> Spans:
        of = torch.tensor(source)
        return _spans(layout.tokens_before(low, of), layout.tokens_before(high, of))

    table: list[tuple[Spans, ...]] = [((),) * 6]
    if size > 1:
        # Step 0: the rank's own keys leave; nothing has come.
        table = [((), spans(rank, starts, beyond[:, size - 2]), (), (), (), ())]
    for step in range(1, size):
        source = (rank - step) % size
        ranks_left = size - 1 - step
        needed = onward[:, ranks_left]
        later = beyond[:, ranks_left - 1] if ranks_left else starts
        arrived = torch.minimum(before[:, step - 2], needed) if step > 1 else starts
        present = torch.maximum(arrived, last[:, rank])
        # The same of this rank's own keys, as they are at rank + step.
        away = torch.minimum(beyond[:, step - 2], rest[:, step]) if step > 1 else starts
        away = torch.maximum(away, last[:, (rank + step) % size])
        onto = rest[:, step + 1] if ranks_left else starts
        table.append(
            (
                spans(source, starts, needed),
                spans(source, starts, later),
                spans(source, starts, arrived),
                spans(source, starts, torch.minimum(present, later)),
                spans(source, torch.minimum(present, later), present),
                spans(rank, torch.minimum(away, onto), away),
            )
        )
    return Travel(*zip(*table, strict=True))


def count_rows(spans: Spans) -> int:
    """Rows in all of ``spans``."""
    return sum(stop - start for start, stop in spans)


def _spans(starts: torch.Tensor, stops: torch.Tensor) -> Spans:
    """Merge the ranges that touch and drop the empty ones."""
    real = starts < stops
    starts, stops = starts[real], stops[real]
    if len(starts) == 0:
        return ()
    apart = torch.ones(len(starts) + 1, dtype=torch.bool)
    apart[1:-1] = starts[1:] != stops[:-1]
    return tuple(zip(starts[apart[:-1]].tolist(), stops[apart[1:]].tolist(), strict=True))
