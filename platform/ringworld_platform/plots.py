"""A run's figures as files, through matplotlib's object interface (no pyplot, no global state)."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringworld_platform.curves import Curves, curves_of
from ringworld_platform.figures import FIGURES, FigureKind
from ringworld_platform.plot_style import DOTS_PER_INCH, finish, over_tokens, stage_bands
from ringworld_platform.run_records import PLOTS_FOLDER, RunRecords

VECTOR_LIMIT_STEPS = 3000


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
    curves = curves_of(run)
    if not curves.steps:
        return []
    folder = run.folder / PLOTS_FOLDER
    folder.mkdir(exist_ok=True)
    return [_write(figure, curves, folder) for figure in FIGURES if figure.has_data(curves)]


def _write(kind: FigureKind, curves: Curves, folder: Path) -> Plot:
    figure = Figure(figsize=(9.6, 4.4) if kind.wide else (6.4, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if kind.over == "tokens":
        stage_bands(axes, curves.spans)
        kind.draw(axes, curves)
        over_tokens(axes, curves)
    else:
        kind.draw(axes, curves)
    finish(axes, kind.wide)
    path = folder / f"{kind.name}.png"
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return Plot(
        name=kind.name,
        title=kind.title,
        explanation=kind.explanation,
        over=kind.over,
        path=path,
        data_uri=_embed(figure, curves),
        wide=kind.wide,
    )


def _embed(figure: Figure, curves: Curves) -> str:
    data = io.BytesIO()
    vector = len(curves.steps) <= VECTOR_LIMIT_STEPS
    figure.savefig(data, format="svg" if vector else "png", dpi=DOTS_PER_INCH)
    kind = "svg+xml" if vector else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
