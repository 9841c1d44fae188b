"""Spans: which local rows are meant, where that is a few ranges or a thousand."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ringworld_model.ring.upload import upload


class Spans:
    """Ranges [start, stop) of local rows, ascending, apart, and none of them empty.

    A table and not a list of pairs: of a thousand documents on 64 ranks there are 100,000, which
    would take longer to make than all else of a plan.

    Attributes:
        bounds: int64 [N, 2], start and stop of each. Do not write to it.
    """

    __slots__ = ("bounds",)

    def __init__(self, bounds: torch.Tensor) -> None:
        """Keep ``bounds``, see above."""
        self.bounds = bounds

    @property
    def rows(self) -> int:
        """Rows in all of them."""
        return int(self.bounds.diff(dim=1).sum())

    def index(self, device: torch.device) -> torch.Tensor:
        """Every row, ascending: int64 [rows], made anew on ``device``."""
        return upload(rows_in(self.bounds), device)

    def __len__(self) -> int:
        """Number of ranges."""
        return len(self.bounds)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Start and stop of each."""
        starts, stops = self.bounds.unbind(1)
        return zip(starts.tolist(), stops.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        """Whether the other ones are the same rows."""
        if not isinstance(other, Spans):
            return NotImplemented
        return self is other or torch.equal(self.bounds, other.bounds)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show the ranges."""
        return f"Spans({self.bounds.tolist()})"


def rows_in(bounds: torch.Tensor) -> torch.Tensor:
    """Every number of ranges [start, stop), one range after another: int64.

    Args:
        bounds: int64 [N, 2], start and stop of each.
    """
    starts, stops = bounds.unbind(1)
    lengths = stops - starts
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = (starts - ends + lengths).repeat_interleave(lengths, output_size=total)
    return shift.add_(torch.arange(total))
