"""The figures of a run, drawn with matplotlib's object interface (no pyplot, no global state)."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ringworld_jobs.units import format_tokens
from ringworld_platform.run_records import PLOTS_FOLDER, Record, RunRecords

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, GREY, INK = "#56B4E9", "#CC79A7", "#8A8F98", "#24292F"
MODALITIES = (("text", BLUE, "o"), ("vision", VERMILION, "D"))
STEP_PARTS = (
    ("forward", "forward_seconds", BLUE),
    ("backward", "backward_seconds", SKY),
    ("optimizer", "optimizer_seconds", GREEN),
    ("data", "data_seconds", ORANGE),
    ("checkpoint", "checkpoint_stall_seconds", PURPLE),
)
SMOOTHING_SHARE = 1 / 30
VECTOR_LIMIT_STEPS = 3000
DOTS_PER_INCH = 150

Number = np.float64
Values = np.ndarray[tuple[int], np.dtype[Number]]


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawn figure.

    Attributes:
        name: file name without ending.
        title: what it shows.
        explanation: how to read it, in a sentence or two.
        path: the PNG file.
        data_uri: the same picture for embedding: SVG, or PNG for very long runs.
        wide: it deserves the whole width of a page.
    """

    name: str
    title: str
    explanation: str
    path: Path
    data_uri: str
    wide: bool


@dataclass(frozen=True, slots=True)
class Span:
    """One stage's stretch of the token axis."""

    label: str
    first: float
    last: float
    stage_index: int


@dataclass(frozen=True, slots=True)
class Curves:
    """The step records as arrays over tokens.

    Attributes:
        steps: effective step records, in order.
        tokens: [N] tokens consumed after each step.
        spans: the stages' stretches of the axis.
        validations: validation records, the last one of each stage.
    """

    steps: list[Record]
    tokens: Values
    spans: list[Span]
    validations: dict[int, Record]

    def values(self, name: str) -> Values:
        """[N] one metric, NaN where a step does not have it."""
        return np.array([float(step.get(name, np.nan)) for step in self.steps], dtype=Number)

    def part(self, span: Span) -> slice:
        """Positions of a stage's steps."""
        indices = [int(step.get("stage_index", 0)) for step in self.steps]
        first = indices.index(span.stage_index)
        return slice(first, first + indices.count(span.stage_index))


def curves_of(run: RunRecords) -> Curves:
    """Arrange a run's records for drawing."""
    steps = run.steps()
    tokens = np.array([float(step.get("tokens", i)) for i, step in enumerate(steps)], dtype=Number)
    contexts = {
        int(record["stage_index"]): int(record["context_length"])
        for record in run.of_kind("stage_start")
        if "context_length" in record
    }
    spans: list[Span] = []
    previous = 0.0
    for index in sorted({int(step.get("stage_index", 0)) for step in steps}):
        inside = [i for i, step in enumerate(steps) if int(step.get("stage_index", 0)) == index]
        name = str(steps[inside[0]].get("stage", index))
        if index in contexts:
            name = f"{name}: {format_tokens(contexts[index])}"
        last = float(tokens[inside[-1]])
        spans.append(Span(name, previous, last, index))
        previous = last
    validations = {
        int(record.get("stage_index", 0)): record for record in run.of_kind("validation")
    }
    return Curves(steps, tokens, spans, validations)


def running_mean(values: Values, window: int) -> Values:
    """Centred mean over ``window`` points, over fewer at the ends; NaN points are left out.

    Args:
        values: [N].
        window: points; made odd.

    Returns:
        [N], NaN only where a whole window is NaN.
    """
    kernel = np.ones(window + 1 - window % 2, dtype=Number)
    present = np.isfinite(values)
    # "full", cut by hand: numpy's "same" returns the kernel's length when it is the longer one.
    half = len(kernel) // 2
    total = np.convolve(np.where(present, values, 0.0), kernel, "full")[half : half + len(values)]
    count = np.convolve(present.astype(Number), kernel, "full")[half : half + len(values)]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)


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


@dataclass(frozen=True, slots=True)
class FigureKind:
    """How one figure is drawn."""

    name: str
    title: str
    explanation: str
    draw: Callable[[Axes, Curves], None]
    needs: tuple[str, ...]
    wide: bool = False

    def has_data(self, curves: Curves) -> bool:
        """Whether any step has one of the metrics that it shows."""
        return any(np.nanmax(np.nan_to_num(curves.values(name))) > 0 for name in self.needs)


def _write(kind: FigureKind, curves: Curves, folder: Path) -> Plot:
    figure = Figure(figsize=(9.6, 4.4) if kind.wide else (6.4, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _stage_bands(axes, curves.spans)
    kind.draw(axes, curves)
    _finish(axes, curves, kind.wide)
    path = folder / f"{kind.name}.png"
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return Plot(kind.name, kind.title, kind.explanation, path, _embed(figure, curves), kind.wide)


def _embed(figure: Figure, curves: Curves) -> str:
    data = io.BytesIO()
    vector = len(curves.steps) <= VECTOR_LIMIT_STEPS
    figure.savefig(data, format="svg" if vector else "png", dpi=DOTS_PER_INCH)
    kind = "svg+xml" if vector else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"


def _stage_bands(axes: Axes, spans: Sequence[Span]) -> None:
    for position, span in enumerate(spans):
        if position % 2 == 0:
            axes.axvspan(span.first, span.last, color="#F1F3F5", zorder=0, linewidth=0)
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


def _finish(axes: Axes, curves: Curves, wide: bool) -> None:
    axes.set_xlim(0, float(curves.tokens[-1]) * 1.01)
    axes.set_xlabel("tokens", fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    axes.grid(axis="y", color="#E3E6EA", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#C5CAD1")
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=6 if wide else 4,
            fontsize=8,
            frameon=False,
            borderaxespad=0.2,
            columnspacing=1.2,
            handlelength=1.8,
        )


def _smooth_line(axes: Axes, curves: Curves, values: Values, color: str, label: str) -> None:
    """Raw points, faint, under a running mean that does not cross from one stage to the next."""
    axes.plot(curves.tokens, values, ".", color=color, alpha=0.4, markersize=5, markeredgewidth=0)
    for span in curves.spans:
        part = curves.part(span)
        window = max(3, round((part.stop - part.start) * SMOOTHING_SHARE) | 1)
        mean = running_mean(values[part], window)
        axes.plot(curves.tokens[part], mean, color=color, linewidth=1.8, label=label)
        label = "_nolegend_"


def _from_zero(axes: Axes, *values: Values) -> None:
    """Show zero, and leave room for the stages' names above the highest value."""
    highest = max(float(np.nanmax(np.nan_to_num(v))) for v in values)
    axes.set_ylim(0, highest * 1.18 or 1.0)


def _draw_loss(axes: Axes, curves: Curves) -> None:
    for name, color, marker in MODALITIES:
        values = curves.values(f"loss_{name}")
        if not np.isfinite(values).any():
            continue
        _smooth_line(axes, curves, values, color, f"{name}")
        scored = {
            span: record
            for span in curves.spans
            if (record := curves.validations.get(span.stage_index)) and f"loss_{name}" in record
        }
        axes.plot(
            [span.last for span in scored],
            [float(record[f"loss_{name}"]) for record in scored.values()],
            marker,
            color="white",
            markeredgecolor=color,
            markeredgewidth=1.8,
            markersize=7,
            label=f"{name}, held out" if scored else "_nolegend_",
            clip_on=False,
            zorder=5,
        )
        label = f"{name}, guessing by frequency"
        for span, record in scored.items():
            baseline = record.get(f"unigram_entropy_{name}")
            if baseline is not None:
                axes.hlines(
                    float(baseline),
                    span.first,
                    span.last,
                    color=color,
                    linestyle=(0, (4, 3)),
                    linewidth=1.1,
                    label=label,
                )
                label = "_nolegend_"
    axes.set_ylabel("loss, nats a token", fontsize=9, color=INK)
    axes.margins(y=0.1)


def _line(name: str, label: str, color: str, scale: float = 1.0) -> Callable[[Axes, Curves], None]:
    def draw(axes: Axes, curves: Curves) -> None:
        _smooth_line(axes, curves, curves.values(name) * scale, color, label)
        axes.set_ylabel(label, fontsize=9, color=INK)
        axes.margins(y=0.16)

    return draw


def _draw_learning_rate(axes: Axes, curves: Curves) -> None:
    for span in curves.spans:
        part = curves.part(span)
        axes.plot(curves.tokens[part], curves.values("learning_rate")[part], color=GREEN)
    axes.set_ylabel("learning rate", fontsize=9, color=INK)
    _from_zero(axes, curves.values("learning_rate"))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.yaxis.get_offset_text().set_fontsize(8)


def _draw_throughput(axes: Axes, curves: Curves) -> None:
    _smooth_line(axes, curves, curves.values("tokens_per_second"), BLUE, "tokens/s")
    axes.set_ylabel("tokens a second", fontsize=9, color=INK)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _from_zero(axes, curves.values("tokens_per_second"))


def _draw_step_time(axes: Axes, curves: Curves) -> None:
    parts = np.stack([np.nan_to_num(curves.values(name)) for _, name, _ in STEP_PARTS])
    total = curves.values("step_seconds")
    rest = np.clip(np.nan_to_num(total - parts.sum(axis=0)), 0.0, None)
    edges = np.concatenate([[0.0], curves.tokens])
    below = np.zeros(len(curves.steps), dtype=Number)
    bands = [(label, color) for label, _, color in STEP_PARTS] + [("other", "#C5CAD1")]
    for (label, color), band in zip(bands, [*parts, rest], strict=True):
        if band.max() <= 0:
            continue
        axes.stairs(
            below + band, edges, baseline=below, fill=True, color=color, label=label, linewidth=0
        )
        below = below + band
    wait = curves.values("ring_wait_seconds")
    if np.nanmax(np.nan_to_num(wait)) > 0:
        axes.stairs(np.nan_to_num(wait), edges, color=INK, linewidth=1.2, label="ring wait")
    axes.set_ylabel("seconds a step", fontsize=9, color=INK)
    axes.set_ylim(0, float(np.quantile(below, 0.99)) * 1.3 + 1e-9)


def _draw_ring(axes: Axes, curves: Curves) -> None:
    kinds = (("compute", "ring_compute", BLUE), ("exposed wait", "ring_wait", VERMILION))
    shown = []
    for label, name, color in kinds:
        mean, most = curves.values(f"{name}_seconds"), curves.values(f"{name}_max_seconds")
        shown += [mean, most]
        axes.plot(curves.tokens, mean, color=color, linewidth=1.8, label=label)
        axes.plot(
            curves.tokens,
            most,
            color=color,
            linewidth=1.0,
            linestyle=(0, (3, 2)),
            label=f"{label}, most",
        )
    axes.set_ylabel("seconds a step", fontsize=9, color=INK)
    _from_zero(axes, *shown)


def _draw_memory(axes: Axes, curves: Curves) -> None:
    kinds = (("host", "memory_host_bytes", BLUE), ("device", "memory_device_bytes", VERMILION))
    for label, name, color in kinds:
        values = curves.values(name)
        if np.nanmax(np.nan_to_num(values)) > 0:
            axes.plot(curves.tokens, values, color=color, linewidth=1.8, label=label)
    axes.set_ylabel("memory of rank 0", fontsize=9, color=INK)
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    _from_zero(axes, *(curves.values(name) for _, name, _ in kinds))


FIGURES = (
    FigureKind(
        "loss",
        "Loss by modality",
        "Points are steps, lines their running mean; shaded bands are the stages of the "
        "curriculum. Open markers are the loss on held-out rows at a stage's end. A dashed line is "
        "the entropy of the token frequencies: a model above it knows less than which tokens are "
        "common. "
        "A step up at a band's edge is the price of a longer context, and should heal.",
        _draw_loss,
        ("loss_text", "loss_vision"),
        wide=True,
    ),
    FigureKind(
        "step_time",
        "Where a step's time goes",
        "Seconds of a step by phase. Ring wait is the part of forward and backward in which a "
        "worker had to wait for its neighbour's keys and values: communication that computing did "
        "not hide.",
        _draw_step_time,
        ("step_seconds",),
    ),
    FigureKind(
        "throughput",
        "Tokens a second",
        "All workers together. It falls with a longer context, because attention's cost per token "
        "grows with the length; a fall within a stage is worth a look.",
        _draw_throughput,
        ("tokens_per_second",),
    ),
    FigureKind(
        "grad_norm",
        "Gradient norm",
        "Global norm before clipping. Spikes that do not come back down announce trouble.",
        _line("grad_norm", "gradient norm", PURPLE),
        ("grad_norm",),
    ),
    FigureKind(
        "learning_rate",
        "Learning rate",
        "The rate that the optimizer used; each stage has its own warm-up and schedule.",
        _draw_learning_rate,
        ("learning_rate",),
    ),
    FigureKind(
        "ring",
        "The ring",
        "Seconds of a step that ring attention computed, and waited for transfers that computing "
        "did not hide, forward and backward together: the mean over the workers, and dashed the "
        "most of any. A dashed line far above its mean is imbalance: the others wait for that "
        "worker.",
        _draw_ring,
        ("ring_bytes_sent",),
    ),
    FigureKind(
        "memory",
        "Memory",
        "Resident memory of rank 0's process on the host, and the peak on its device where it has "
        "one. It should be flat within a stage.",
        _draw_memory,
        ("memory_host_bytes", "memory_device_bytes"),
    ),
)
