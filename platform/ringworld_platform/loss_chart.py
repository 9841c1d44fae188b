"""A curve over the stages of a run, with axes, made of characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from ringworld_platform.charts import curve_over
from ringworld_platform.text_columns import cut

LABEL_WIDTH = 6
OUTLIERS = 0.02
"""This share of the points may lie above the chart: the first steps would flatten all others."""
COLOURS = {"text": "cyan", "vision": "magenta"}


@dataclass(frozen=True, slots=True)
class Span:
    """A stage on the axis.

    Attributes:
        name: of the stage.
        first: step of the job before its first one.
    """

    name: str
    first: int


def chart(
    title: Text,
    points: Sequence[tuple[int, float]],
    spans: Sequence[Span],
    width: int,
    height: int,
    *,
    style: str = "",
    marks: Mapping[int, float] | None = None,
) -> list[Text]:
    """A title, the curve, and its axis with the stages' names.

    Args:
        title: the first line.
        points: (step of the job, value), in order.
        spans: the stages that have begun, in order.
        width: of the whole, in characters.
        height: of the whole, in lines: at least 4.
        style: of the curve.
        marks: values that stand for themselves, such as held-out losses, by step.
    """
    columns, rows = max(4, width - LABEL_WIDTH - 2), max(2, height - 2)
    first = min((span.first for span in spans), default=points[0][0] if points else 0)
    last = max((step for step, _ in points), default=first + 1)
    values = sorted([value for _, value in points] + list((marks or {}).values()))
    low = values[0] if values else 0.0
    high = values[min(len(values) - 1, int(len(values) * (1 - OUTLIERS)))] if values else 1.0
    if high <= low:
        high = low + max(abs(low) * 0.1, 1e-9)
    extent = (first, max(last, first + 1))
    drawn = curve_over(points, extent, (low, high), columns, rows)
    edges = [_column(span.first, extent, columns) for span in spans[1:]]
    labels = {0: high, rows - 1: low, **({rows // 2: _middle(low, high, rows)} if rows > 4 else {})}
    lines = [cut(title, width)]
    held = _cells(marks or {}, extent, (low, high), columns, rows)
    for row, dots in enumerate(drawn):
        label = number(labels[row]) if row in labels else ""
        line = Text().append(f"{label:>{LABEL_WIDTH}} ", "dim")
        line.append("┤" if label else "│", "dim")
        for column, dot in enumerate(dots):
            if (row, column) in held:
                line.append("◆", "bold")
            elif dot == "\u2800" and column in edges:
                line.append("┊", "dim")
            else:
                line.append(dot, style)
        lines.append(cut(line, width))
    axis = " " * (LABEL_WIDTH + 1) + "└" + _axis(spans, edges, columns)
    lines.append(cut(Text(axis, style="dim"), width))
    return lines


def number(value: float) -> str:
    """A label of the axis, six characters at most."""
    size = abs(value)
    if size and (size < 0.01 or size >= 1e6):
        return f"{value:.0e}"
    return f"{value:.2f}" if size < 1000 else f"{value:.0f}"


def _axis(spans: Sequence[Span], edges: Sequence[int], columns: int) -> str:
    """The line below, each stage's name where it begins, as far as there is room."""
    cells = ["─"] * columns
    starts = [0, *edges]
    for order, (span, start) in enumerate(zip(spans, starts, strict=False)):
        if order:
            cells[start] = "┴"
        end = starts[order + 1] if order + 1 < len(starts) else columns
        begin = start + (1 if order else 0)
        if len(span.name) <= end - begin:
            cells[begin : begin + len(span.name)] = span.name
    return "".join(cells)


def _column(step: int, extent: tuple[int, int], columns: int) -> int:
    first, last = extent
    return min(columns - 1, max(0, int((step - first) / (last - first) * columns)))


def _middle(low: float, high: float, rows: int) -> float:
    return high - (high - low) * (rows // 2) / (rows - 1)


def _cells(
    marks: Mapping[int, float],
    extent: tuple[int, int],
    limits: tuple[float, float],
    columns: int,
    rows: int,
) -> set[tuple[int, int]]:
    low, high = limits
    found = set()
    for step, value in marks.items():
        row = round((high - min(max(value, low), high)) / (high - low) * (rows - 1))
        found.add((row, _column(step - 1, extent, columns)))
    return found
