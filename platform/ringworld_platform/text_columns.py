"""Tables for a terminal of a given width: what does not fit is left out by rank, or cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.text import Text

GAP = 2


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        heading: above it.
        cells: one a row.
        right: aligned so.
        leave: the column of the highest number is left out first; of 0, never.
        styles: of the cells, where they have one; empty ones mean none.
    """

    heading: str
    cells: Sequence[str]
    right: bool = False
    leave: int = 0
    styles: Sequence[str] = field(default_factory=tuple)

    @property
    def width(self) -> int:
        """Characters that it takes."""
        return max(map(cell_len, [self.heading, *self.cells]))


def lay_out(columns: Sequence[Column], width: int, row_styles: Sequence[str] = ()) -> list[Text]:
    """A heading and a line for each row, none wider than ``width``.

    Columns without any text are left out. The last one that stays may be cut.

    Args:
        columns: from left to right.
        width: of the terminal.
        row_styles: of the rows, where they have one.
    """
    kept = [column for column in columns if any(column.cells)]
    while len(kept) > 1 and _total(kept) > width:
        last = max(kept, key=lambda column: column.leave)
        if last.leave == 0:
            break
        kept.remove(last)
    heading = cut(Text("  ".join(_padded(c.heading, c) for c in kept).rstrip()), width)
    # Underlined to the edge: a line of its own would cost a row.
    heading.append(" " * (width - heading.cell_len))
    heading.stylize("dim underline")
    lines = [heading]
    for row in range(len(columns[0].cells) if columns else 0):
        line = Text(style=row_styles[row] if row < len(row_styles) else "")
        for number, column in enumerate(kept):
            style = column.styles[row] if row < len(column.styles) else ""
            line.append(" " * GAP if number else "")
            line.append(_padded(column.cells[row], column), style)
        line.rstrip()
        lines.append(cut(line, width))
    return lines


def cut(line: Text, width: int) -> Text:
    """A line of no more than so many characters, with a sign where it was cut; it is changed."""
    line.truncate(max(1, width), overflow="ellipsis")
    return line


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)


def _padded(text: str, column: Column) -> str:
    if column.right:
        return " " * (column.width - cell_len(text)) + text
    return set_cell_size(text, column.width)
