"""A run's figures as files, through matplotlib's object interface (no pyplot, no global state)."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringworld_platform.curves import Curves, curves_of
from ringworld_platform.figures import FIGURES, FigureKind
from ringworld_platform.plot_style import DOTS_PER_INCH, finish, over_tokens, stage_bands
from ringworld_platform.run_records import PLOTS_FOLDER, RunRecords

VECTOR_LIMIT_STEPS = 3000
LEARNING = ("loss", "curriculum", "position")
"""Figures that are drawn anew at each stage's end."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawn figure.

    Attributes:
        name: file name without ending.
        title: what it shows.
        explanation: how to read it, in a sentence or two.
        over: what its x axis counts.
        path: the PNG file.
        data_uri: the same picture for embedding: SVG, or PNG for very long runs.
        wide: it deserves the whole width of a page.
    """

    name: str
    title: str
    explanation: str
    over: str
    path: Path
    data_uri: str
    wide: bool


def write_plots(run: RunRecords) -> list[Plot]:
    """Draw every figure that the run has data for into its ``plots`` folder.

    Returns:
        The figures, most telling first; empty for a run without steps.
    """
    return [
        Plot(
            name=kind.name,
            title=kind.title,
            explanation=kind.explanation,
            over=kind.over,
            path=_save(kind, figure, run.folder),
            data_uri=_embed(figure, curves),
            wide=kind.wide,
        )
        for kind, figure, curves in _drawn(run, FIGURES)
    ]


def write_learning_curves(run: RunRecords) -> list[Path]:
    """Draw only what tells how learning goes: losses over tokens, and by position.

    Returns:
        The PNG files; none for a run without steps.
    """
    kinds = [kind for kind in FIGURES if kind.name in LEARNING]
    return [_save(kind, figure, run.folder) for kind, figure, _ in _drawn(run, kinds)]


def _drawn(
    run: RunRecords, kinds: Sequence[FigureKind]
) -> Iterator[tuple[FigureKind, Figure, Curves]]:
    curves = curves_of(run)
    for kind in kinds if curves.steps else ():
        if kind.has_data(curves):
            yield kind, _draw(kind, curves), curves


def _draw(kind: FigureKind, curves: Curves) -> Figure:
    figure = Figure(figsize=(9.6, 4.4) if kind.wide else (6.4, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if kind.over == "tokens":
        # Where colours tell the stages apart, their names stand in the legend.
        stage_bands(axes, curves.spans, named=kind.name != "curriculum")
        kind.draw(axes, curves)
        over_tokens(axes, curves)
    else:
        kind.draw(axes, curves)
    finish(axes, kind.wide)
    return figure


def _save(kind: FigureKind, figure: Figure, folder: Path) -> Path:
    path = folder / PLOTS_FOLDER / f"{kind.name}.png"
    path.parent.mkdir(exist_ok=True)
    # Whole or not at all: somebody may be sending it.
    scratch = path.with_suffix(".png.tmp")
    figure.savefig(scratch, format="png", dpi=DOTS_PER_INCH)
    scratch.replace(path)
    return path


def _embed(figure: Figure, curves: Curves) -> str:
    data = io.BytesIO()
    vector = len(curves.steps) <= VECTOR_LIMIT_STEPS
    figure.savefig(data, format="svg" if vector else "png", dpi=DOTS_PER_INCH)
    kind = "svg+xml" if vector else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
