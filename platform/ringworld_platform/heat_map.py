"""The needle tests as pictures: what was found by context length and depth, from red to green."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ringworld_jobs.units import format_tokens
from ringworld_platform.plot_style import DOTS_PER_INCH, GREY, INK
from ringworld_platform.run_records import Record

_COLOURS = LinearSegmentedColormap.from_list("found", ["#D73027", "#FEE08B", "#1A9850"])
_NOT_ASKED = "#E3E6EA"
_MOST_NUMBERS = 12
"""Columns or rows up to which cells hold their score, for who cannot tell the colours."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scores by column and row.

    Attributes:
        columns: names, left to right.
        rows: names, top to bottom.
        scores: float [rows, columns], mean of the cell from 0 to 1; nan: not asked.
        column_label: what the columns are.
        row_label: what the rows are.
        title: above the grid; empty: none.
    """

    columns: Sequence[str]
    rows: Sequence[str]
    scores: np.ndarray
    column_label: str
    row_label: str
    title: str = ""


def draw_needles(
    answers: Sequence[Record], figures: Mapping[str, float], title: str, path: Path
) -> None:
    """Draw the figure that every reader of the paper knows: depth over context length.

    Args:
        answers: ``length``, ``depth`` and ``score`` of each.
        figures: ``accuracy``.
        title: of the picture.
        path: of the PNG file.
    """
    grid = _grid(answers, "length", "depth", "context length, tokens", "depth of the needle, %")
    _write([grid], _titled(title, figures), path)


def draw_many_needles(
    answers: Sequence[Record], figures: Mapping[str, float], title: str, path: Path
) -> None:
    """Draw the mean score of each case over context length.

    Args:
        answers: ``length``, ``hidden``, ``asked`` and ``score`` of each.
        figures: ``accuracy``.
        title: of the picture.
        path: of the PNG file.
    """
    cases = sorted({(answer["hidden"], answer["asked"]) for answer in answers})
    numbered = [
        {**answer, "case": cases.index((answer["hidden"], answer["asked"]))} for answer in answers
    ]
    grid = _grid(numbered, "length", "case", "context length, tokens", "needles")
    names = [f"{hidden} hidden, {asked} asked" for hidden, asked in cases]
    _write(
        [Grid(grid.columns, names, grid.scores, grid.column_label, "")],
        _titled(title, figures),
        path,
    )


def draw_video_needles(
    answers: Sequence[Record], figures: Mapping[str, float], title: str, path: Path
) -> None:
    """Draw depth over the frames of the clip, for what is asked side by side.

    Args:
        answers: ``frames``, ``depth``, ``ask`` and ``score`` of each.
        figures: ``accuracy``.
        title: of the picture.
        path: of the PNG file.
    """
    grids = [
        _grid(
            [answer for answer in answers if answer["ask"] == ask],
            "frames",
            "depth",
            "frames of the clip",
            "depth of the frame, %",
            f"asked for its {ask}",
        )
        for ask in sorted({answer["ask"] for answer in answers})
    ]
    _write(grids, _titled(title, figures), path)


def _grid(
    answers: Sequence[Record],
    column: str,
    row: str,
    column_label: str,
    row_label: str,
    title: str = "",
) -> Grid:
    columns = sorted({answer[column] for answer in answers})
    rows = sorted({answer[row] for answer in answers})
    cells: dict[tuple[float, float], list[float]] = {}
    for answer in answers:
        cells.setdefault((answer[row], answer[column]), []).append(answer["score"])
    scores = np.full((len(rows), len(columns)), np.nan)
    for (down, across), found in cells.items():
        scores[rows.index(down), columns.index(across)] = sum(found) / len(found)
    names = [format_tokens(name) if column == "length" else f"{name:,}" for name in columns]
    return Grid(names, [f"{name:.0f}" for name in rows], scores, column_label, row_label, title)


def _titled(title: str, figures: Mapping[str, float]) -> str:
    accuracy = figures.get("accuracy")
    return title if accuracy is None else f"{title}: {100 * accuracy:.1f} % found"


def _write(grids: Sequence[Grid], title: str, path: Path) -> None:
    across = max(len(grid.columns) for grid in grids)
    down = max(len(grid.rows) for grid in grids)
    width = len(grids) * (1.6 + min(9.0, max(2.6, 0.5 * across))) + 0.9
    figure = Figure(figsize=(width, 1.5 + min(6.0, max(1.4, 0.36 * down))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
    all_axes = [figure.add_subplot(1, len(grids), number + 1) for number in range(len(grids))]
    for axes, grid in zip(all_axes, grids, strict=True):
        _draw(axes, grid)
    bar = figure.colorbar(all_axes[0].images[0], ax=all_axes, fraction=0.04, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw(axes: Axes, grid: Grid) -> None:
    axes.set_facecolor(_NOT_ASKED)
    axes.imshow(np.ma.masked_invalid(grid.scores), cmap=_COLOURS, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(*_ticks(grid.columns), rotation=45 if len(grid.columns) > 8 else 0)
    axes.set_yticks(*_ticks(grid.rows))
    # White lines part the cells.
    axes.set_xticks(np.arange(1, len(grid.columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(grid.rows)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK, length=2)
    axes.set_xlabel(grid.column_label, fontsize=9, color=INK)
    axes.set_ylabel(grid.row_label, fontsize=9, color=INK)
    axes.set_title(grid.title, fontsize=9, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if max(len(grid.columns), len(grid.rows)) > _MOST_NUMBERS:
        return
    for row, column in zip(*np.nonzero(~np.isnan(grid.scores)), strict=True):
        score = grid.scores[row, column]
        colour = "white" if score < 0.2 or score > 0.9 else INK
        axes.text(
            column, row, f"{100 * score:.0f}", ha="center", va="center", fontsize=7, color=colour
        )


def _ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Places and names, few enough to be read."""
    step = max(1, round(len(names) / 24))
    places = range(0, len(names), step)
    return list(places), [names[place] for place in places]
