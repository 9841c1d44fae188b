"""Loss against context length as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringworld_jobs.units import format_tokens
from ringworld_platform.plot_style import BLUE, DOTS_PER_INCH, finish
from ringworld_platform.run_records import Record

PREFIX = "loss_at_"


def losses_at(figures: Mapping[str, float]) -> dict[int, float]:
    """The loss at each length, shortest first."""
    found = {
        int(name.removeprefix(PREFIX)): value
        for name, value in figures.items()
        if name.startswith(PREFIX)
    }
    return dict(sorted(found.items()))


def draw_losses(
    answers: Sequence[Record], figures: Mapping[str, float], title: str, path: Path
) -> None:
    """Draw nats per target over the length of context, each document faint behind the mean.

    Args:
        answers: of all documents at all lengths: ``document``, ``length``, ``nll``, ``weight``.
        figures: of the task.
        title: of the picture.
        path: of the PNG file.
    """
    losses = losses_at(figures)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for document in sorted({str(answer["id"]).rpartition("@")[0] for answer in answers}):
        mine = {
            int(answer["length"]): answer["nll"] / answer["weight"]
            for answer in answers
            if str(answer["id"]).rpartition("@")[0] == document and answer["weight"] > 0
        }
        axes.plot(sorted(mine), [mine[n] for n in sorted(mine)], color="#c9ced6", linewidth=0.8)
    axes.plot(list(losses), list(losses.values()), color=BLUE, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(losses), [format_tokens(length) for length in losses])
    axes.minorticks_off()
    axes.set_xlabel("tokens of a piece: what a target may see of its document")
    axes.set_ylabel("nats per target")
    axes.set_title(title, fontsize=10, loc="left")
    finish(axes, False)
    figure.savefig(path, dpi=DOTS_PER_INCH)
