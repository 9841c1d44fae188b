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
from ringworld_model.ring.spans import Spans


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
    # A document inside one block stays at home.
    block = layout.block_tokens
    spread = (starts // block < (ends - 1) // block).nonzero()[:, 0]
    starts, ends = starts[spread], ends[spread]
    if size == 1 or len(starts) == 0:
        nothing = Spans(torch.empty(0, 2, dtype=torch.int64))
        return Travel(*((nothing,) * size,) * 6)
    every = torch.arange(size)
    last = _last_tokens(layout, starts, ends, spread)  # [R, D]
    # All tables by (step, document). What a rank needs of a document ends at its last token, and
    # what several need at the furthest of theirs.
    source = (rank - every) % size
    ahead = last[(rank + every) % size]  # of this rank, the next one, and so on
    needed = ahead.cummax(0).values.flip(0)  # by this rank and those after it
    near = ahead[1:].cummax(0).values
    later = torch.cat((near.flip(0), starts[None]))  # by those after it only
    none = starts.expand(2, -1)
    before = last[(rank - every[1:]) % size].cummax(0).values  # by those that had the keys before
    arrived = torch.minimum(torch.cat((none, before[:-1])), needed)
    present = torch.maximum(arrived, last[rank])
    onward = torch.minimum(present, later)
    # The same of this rank's own keys, as they are at rank + step.
    rest = ahead.flip(0).cummax(0).values.flip(0)
    away = torch.maximum(torch.minimum(torch.cat((none, near[:-1])), rest), ahead)
    onto = torch.cat((rest[1:], starts[None]))
    begin = starts.expand(size, -1)
    visiting = torch.stack((begin, needed, later, arrived, onward, present))
    begin, needed, later, arrived, onward, present = layout.tokens_before(
        visiting, source[:, None], spread
    )
    own = torch.stack((torch.minimum(away, onto), away))
    kept, away = layout.tokens_before(own, torch.tensor(rank), spread)
    low = torch.stack((begin, begin, begin, begin, onward, kept))
    high = torch.stack((needed, later, arrived, onward, present, away))
    # At step 0 the rank's own keys leave, and nothing else happens.
    high[torch.tensor([0, 2, 3, 4, 5]), 0] = 0
    spans = _spans(low.flatten(0, 1), high.flatten(0, 1))
    return Travel(*(tuple(spans[first : first + size]) for first in range(0, 6 * size, size)))


def _last_tokens(
    layout: Layout, starts: torch.Tensor, ends: torch.Tensor, documents: torch.Tensor
) -> torch.Tensor:
    """Row index after each rank's last token of each document: int64 [R, D].

    The document's start where the rank holds none of it.
    """
    every = torch.arange(layout.ring_size)[:, None]
    held = layout.tokens_before(ends, every, documents)
    holds = held > layout.tokens_before(starts, every, documents)
    return torch.where(holds, layout.row_index((held - 1).clamp(min=0), every) + 1, starts)


def _spans(starts: torch.Tensor, stops: torch.Tensor) -> list[Spans]:
    """Spans of each row of [N, D], ascending: touching ranges merged, empty ones dropped."""
    real = starts < stops
    ends = real.sum(1).cumsum(0)
    starts, stops = starts[real], stops[real]
    apart = torch.ones(len(starts) + 1, dtype=torch.bool)
    apart[1:-1] = starts[1:] != stops[:-1]
    apart[ends] = True
    first, last = apart[:-1], apart[1:]
    bounds = torch.stack((starts[first], stops[last]), 1)
    counts = torch.nn.functional.pad(first.cumsum(0), (1, 0))[ends].diff(prepend=ends.new_zeros(1))
    return [Spans(part) for part in bounds.split(counts.tolist())]
