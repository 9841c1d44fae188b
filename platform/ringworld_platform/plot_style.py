"""How every figure looks: colours, the stages' bands, axes and legend."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from ringworld_platform.curves import Curves, Span

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, GREY, INK = "#56B4E9", "#CC79A7", "#8A8F98", "#24292F"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DOTS_PER_INCH = 150


def stage_bands(axes: Axes, spans: Sequence[Span], *, named: bool = True) -> None:
    """Shade every other stage's stretch of the token axis, and name them all."""
    for position, span in enumerate(spans):
        if position % 2 == 0:
            axes.axvspan(span.first, span.last, color="#F1F3F5", zorder=0, linewidth=0)
        if not named:
            continue
        axes.annotate(
            span.label,
            ((span.first + span.last) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color=GREY,
        )


def over_tokens(axes: Axes, curves: Curves) -> None:
    """Make the x axis the tokens that the run consumed."""
    axes.set_xlim(0, float(curves.tokens[-1]) * 1.01)
    axes.set_xlabel("tokens", fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7))


def finish(axes: Axes, wide: bool) -> None:
    """Set the ticks, the grid, the spines and, for more than one curve, a legend on top."""
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    axes.grid(axis="y", color="#E3E6EA", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#C5CAD1")
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        rows = math.ceil(len(labels) / (6 if wide else 4))
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=math.ceil(len(labels) / rows),
            fontsize=8,
            frameon=False,
            borderaxespad=0.2,
            columnspacing=1.2,
            handlelength=1.8,
        )
