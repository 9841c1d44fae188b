"""Pictures of prepared data: contact sheets of samples, and how long the examples are."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ringworld_platform.plot_style import BLUE, DOTS_PER_INCH, GREY, INK, VERMILION

_FRAME_INCHES = 1.15
_TEXT_WIDTH = 150
_TEXT_LINES = 6
_LINE_INCHES = 0.17


@dataclass(frozen=True, slots=True)
class Strip:
    """One sample of a contact sheet.

    Attributes:
        title: what it is called, and its size.
        parts: in order, its texts and its clips: (text, whether it carries loss) or
            (pictures uint8 [P, N, N, 3], what to say of them).
    """

    title: str
    parts: tuple[tuple[str, bool] | tuple[npt.NDArray[np.uint8], str], ...]


def draw_sheet(heading: str, strips: Sequence[Strip], path: Path) -> None:
    """A sheet with a block a sample: its text and its frames, in the order of its tokens.

    Text that carries loss is dark, text without is grey.
    """
    blocks: list[tuple[float, str, object, str]] = [(0.34, "heading", heading, INK)]
    for strip in strips:
        blocks.append((0.3, "title", strip.title, INK))
        for part in strip.parts:
            if isinstance(part[0], str):
                lines = textwrap.wrap(part[0], _TEXT_WIDTH) or [""]
                if len(lines) > _TEXT_LINES:
                    # The end too: a question stands after a long text.
                    half = _TEXT_LINES // 2
                    lines = [*lines[:half], "[...]", *lines[-half:]]
                height = _LINE_INCHES * len(lines) + 0.06
                blocks.append((height, "text", "\n".join(lines), INK if part[1] else GREY))
            else:
                blocks.append((0.2, "note", part[1], GREY))
                if len(part[0]):
                    blocks.append((_FRAME_INCHES + 0.08, "frames", part[0], INK))
    width, height = 10.0, sum(block[0] for block in blocks) + 0.2
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    top = height - 0.1
    for size, kind, content, colour in blocks:
        if isinstance(content, np.ndarray):
            for number, frame in enumerate(content):
                left = 0.15 + number * (_FRAME_INCHES + 0.06)
                box = (left / width, (top - _FRAME_INCHES) / height)
                axes = figure.add_axes((*box, _FRAME_INCHES / width, _FRAME_INCHES / height))
                axes.imshow(frame, interpolation="nearest")
                axes.set_axis_off()
        else:
            size_of = {"heading": 12, "title": 9.5, "text": 8.5, "note": 8}[kind]
            figure.text(
                0.15 / width,
                (top - (0.08 if kind == "title" else 0.0)) / height,
                _plain(str(content)),
                fontsize=size_of,
                fontweight="bold" if kind in ("heading", "title") else "normal",
                style="italic" if kind == "note" else "normal",
                color=colour,
                va="top",
            )
        top -= size
    figure.savefig(path, dpi=DOTS_PER_INCH)


def draw_lengths(
    heading: str, bins: Mapping[str, Sequence[tuple[int, int, int]]], path: Path
) -> None:
    """Bars of how many examples have which length, by split, over powers of two."""
    figure = Figure(figsize=(7.0, 3.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = {split: found for split, found in bins.items() if found}
    for (split, found), colour, shift in zip(
        shown.items(), (BLUE, VERMILION), (0.0, 0.44), strict=False
    ):
        starts = np.log2([low for low, _, _ in found]) + 0.06 + shift
        axes.bar(
            starts, [n for _, _, n in found], width=0.42, align="edge", color=colour, label=split
        )
    lows = sorted({low for found in shown.values() for low, _, _ in found})
    ticks = [*lows, lows[-1] * 2] if lows else []
    axes.set_xticks(np.log2(ticks) if ticks else [], [_tokens(tick) for tick in ticks])
    axes.set_xlabel("tokens of an example")
    axes.set_ylabel("examples")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(heading, fontsize=10, color=INK, loc="left")
    if len(shown) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _tokens(count: int) -> str:
    from ringworld_jobs.units import format_tokens

    return format_tokens(count)


def _plain(text: str) -> str:
    """Matplotlib takes a pair of dollar signs for mathematics."""
    return text.replace("$", r"\$")
