"""The picture of a trained codebook: held-out frames above what became of them, and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringworld_model.vision.frame_tokenizer import FrameTokenizer
from ringworld_workers.codebook.quality import Quality, evenly
from ringworld_workers.data.work import written_whole

SHOWN_FRAMES = 8
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#8A8F98"


def write_report(
    path: Path,
    *,
    records: Sequence[Mapping[str, Any]],
    frames: npt.NDArray[np.uint8],
    tokenizers: Mapping[str, FrameTokenizer],
    qualities: Mapping[str, Quality],
) -> None:
    """Draw the report.

    Args:
        path: the PNG file.
        records: lines of the metrics file.
        frames: held-out frames, uint8 [F, N, N, 3].
        tokenizers: what the frames go through, by name; the trained one first.
        qualities: of the same.
    """
    figure = Figure(figsize=(10, 3.2 + 1.3 * len(tokenizers)), dpi=110)
    FigureCanvasAgg(figure)
    # Fixed margins: matplotlib's own layout draws everything twice.
    grid = figure.add_gridspec(
        2,
        2,
        height_ratios=[1.3 * (len(tokenizers) + 1), 2.4],
        left=0.09,
        right=0.99,
        top=0.99,
        bottom=0.08,
        hspace=0.06,
        wspace=0.16,
    )
    _draw_frames(figure.add_subplot(grid[0, :]), frames, tokenizers, qualities)
    _draw_loss(figure.add_subplot(grid[1, 0]), records)
    _draw_quality(figure.add_subplot(grid[1, 1]), records, qualities)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")


def strip(
    frames: npt.NDArray[np.uint8], tokenizers: Mapping[str, FrameTokenizer]
) -> npt.NDArray[np.uint8]:
    """Frames side by side, and below them what each tokenizer makes of them.

    Args:
        frames: uint8 [F, N, N, 3].
        tokenizers: rows after the first.

    Returns:
        uint8 [(1 + tokenizers) * N, F * N, 3].
    """
    rows = [frames, *(t.decode(t.encode(frames)) for t in tokenizers.values())]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def _draw_frames(
    axes: Axes,
    frames: npt.NDArray[np.uint8],
    tokenizers: Mapping[str, FrameTokenizer],
    qualities: Mapping[str, Quality],
) -> None:
    chosen = np.array(frames[evenly(len(frames), SHOWN_FRAMES)])
    size = chosen.shape[1]
    axes.imshow(strip(chosen, tokenizers), interpolation="nearest")
    names = ["held out", *(f"{name}\n{qualities[name].psnr_db:.2f} dB" for name in tokenizers)]
    axes.set_yticks([size * (row + 0.5) for row in range(len(names))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["loss"] for record in records], color=_BLUE, linewidth=0.8)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss of the crops")
    axes.grid(alpha=0.3)


def _draw_quality(
    axes: Axes, records: Sequence[Mapping[str, Any]], qualities: Mapping[str, Quality]
) -> None:
    measured = [record for record in records if "held_out_psnr_db" in record]
    for name, has_codes, color in (("no codes yet", False, _GREY), ("VQGAN", True, _BLUE)):
        part = [r for r in measured if ("held_out_codes_used" in r) == has_codes]
        points = [r["step"] for r in part], [r["held_out_psnr_db"] for r in part]
        axes.plot(*points, color=color, marker="o", markersize=3, label=name)
    if "patches" in qualities:
        level = qualities["patches"].psnr_db
        axes.axhline(level, color=_VERMILION, linestyle="--", label="patches (k-means)")
    axes.set(xlabel="step", ylabel="held-out PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
