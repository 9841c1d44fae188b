"""What packing does to a dataset at a context length: padding, and how evenly rings are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from ringworld_model.ring import plan_ring
from ringworld_workers.data.mixture import Packing, RowPlanner
from ringworld_workers.data.row_plan import ExampleTooLong
from ringworld_workers.data.shards import Dataset
from ringworld_workers.data.source_walk import PlannedSource

PACKED_ROWS = 256
"""Rows that are packed to tell the padding."""
PLANNED_ROWS = 16
"""Rows of these that a ring is planned for."""


@dataclass(frozen=True, slots=True)
class PackingFigures:
    """One dataset alone in rows of one length.

    Attributes:
        context_length: tokens of a row.
        rows: packed to tell the rest.
        padding: share of their tokens that is padding.
        examples: pieces in a row, on average.
        dropped: examples that the dataset leaves out at this length.
        imbalance: by ring size, the slowest rank's attention over the mean rank's, mean of rows.
        problem: why no row can be packed; empty else.
    """

    context_length: int
    rows: int = 0
    padding: float = 0.0
    examples: float = 0.0
    dropped: int = 0
    imbalance: dict[int, float] | None = None
    problem: str = ""


def packing_figures(
    dataset: Dataset, context_length: int, ring_sizes: Sequence[int], packing: Packing = "best_fit"
) -> PackingFigures:
    """Pack a dataset's first rows, from lengths alone.

    Args:
        dataset: of which all examples are kept.
        context_length: tokens of a row.
        ring_sizes: rings to plan.
        packing: how examples come into rows.
    """
    lengths, dropped = dataset.lengths, 0
    if dataset.longer == "drop":
        lengths = lengths[lengths <= context_length]
        dropped = len(dataset.lengths) - len(lengths)
    if len(lengths) == 0:
        return PackingFigures(context_length, dropped=dropped, problem="no example fits")
    source = PlannedSource(lengths, 1.0, dataset.splittable)
    try:
        planner = RowPlanner({"": source}, context_length, 0, packing=packing, epochs=1)
    except ExampleTooLong:
        too_long = int((lengths > context_length).sum())
        return PackingFigures(
            context_length,
            problem=f"{too_long:,} examples do not fit (longest {lengths.max():,}), and the "
            f"dataset says longer: {dataset.longer}",
        )
    rows = list(islice(planner.iter_from(0), PACKED_ROWS))
    # The rows that were open when the data ended are not full, and no stage ever sees them so.
    rows = rows[: max(1, len(rows) - 6)] if len(rows) < PACKED_ROWS else rows
    return PackingFigures(
        context_length,
        rows=len(rows),
        padding=1 - sum(row.tokens for row in rows) / (len(rows) * context_length),
        examples=sum(len(row.pieces) for row in rows) / len(rows),
        dropped=dropped,
        imbalance={
            size: float(
                np.mean(
                    [
                        plan_ring(
                            [piece.stop - piece.start for piece in row.pieces], context_length, size
                        ).imbalance
                        for row in rows[:PLANNED_ROWS]
                    ]
                )
            )
            for size in ring_sizes
        },
    )


def length_bins(lengths: npt.ArrayLike) -> list[tuple[int, int, int]]:
    """How many lengths lie between each power of two and the next: (from, below, number)."""
    values = np.asarray(lengths)
    if len(values) == 0:
        return []
    powers = np.floor(np.log2(np.maximum(values, 1))).astype(int)
    counts = np.bincount(powers - powers.min())
    first = int(powers.min())
    return [(2 ** (first + i), 2 ** (first + i + 1), int(n)) for i, n in enumerate(counts)]
