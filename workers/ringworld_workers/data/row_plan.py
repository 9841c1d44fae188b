"""What a packing plan consists of: pieces of examples, and the rows that they make."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of one example, in one pass over its source."""

    source: str
    epoch: int
    index: int
    start: int
    stop: int

    @property
    def id(self) -> str:
        """The piece as metrics name it: ``source/epoch/index/start-stop``."""
        return f"{self.source}/{self.epoch}/{self.index}/{self.start}-{self.stop}"


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The pieces of one row, in order; what they leave free is padding."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row, padding not included."""
        return sum(piece.stop - piece.start for piece in self.pieces)


class ExampleTooLong(ValueError):
    """An example that may not be cut does not fit a row.

    Attributes:
        source: its source.
        index: its place there.
    """

    def __init__(self, source: str, index: int, length: int, context_length: int) -> None:
        """Say which example, its length and the limit."""
        super().__init__(
            f"source {source!r}, example {index}: {length} tokens do not fit "
            f"context_length={context_length}; raise context_length, take a source of shorter "
            f"examples, or build the dataset with longer: drop or split"
        )
        self.source = source
        self.index = index
