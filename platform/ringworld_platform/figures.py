"""The figures of a run: what each one shows, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ringworld_jobs.units import format_tokens
from ringworld_platform.curves import Curves, Number, Values, running_mean
from ringworld_platform.plot_style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SERIES,
    SKY,
    VERMILION,
)

MODALITIES = (("text", BLUE, "o"), ("vision", VERMILION, "D"))
STEP_PARTS = (
    ("forward", "forward_seconds", BLUE),
    ("backward", "backward_seconds", SKY),
    ("optimizer", "optimizer_seconds", GREEN),
    ("data", "data_seconds", ORANGE),
    ("checkpoint", "checkpoint_stall_seconds", PURPLE),
)
SMOOTHING_SHARE = 1 / 30


@dataclass(frozen=True, slots=True)
class FigureKind:
    """How one figure is drawn."""

    name: str
    title: str
    explanation: str
    draw: Callable[[Axes, Curves], None]
    needs: tuple[str, ...] = ()
    over: Literal["tokens", "position"] = "tokens"
    wide: bool = False

    def has_data(self, curves: Curves) -> bool:
        """Whether any step, or any held-out score, has what it shows."""
        if self.over == "position":
            return any(curves.by_position(modality) for modality, _, _ in MODALITIES)
        return any(np.nanmax(np.nan_to_num(curves.values(name))) > 0 for name in self.needs)


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
            if (record := curves.validations.get(span.stage_index))
            and record.get(f"loss_{name}") is not None
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


def _draw_curriculum(axes: Axes, curves: Curves) -> None:
    """The loss that is trained on, a colour a stage; its context and RoPE base in the legend."""
    loss = curves.values("loss")
    for order, span in enumerate(curves.spans):
        part, color = curves.part(span), SERIES[order % len(SERIES)]
        window = max(3, round((part.stop - part.start) * SMOOTHING_SHARE) | 1)
        theta = f", θ {span.rope_theta:g}" if span.rope_theta is not None else ""
        tokens = curves.tokens[part]
        axes.plot(tokens, loss[part], ".", color=color, alpha=0.35, markersize=5, mew=0)
        axes.plot(
            tokens,
            running_mean(loss[part], window),
            color=color,
            linewidth=1.8,
            label=f"{span.label}{theta}",
        )
        if order:
            axes.axvline(span.first, color="#C5CAD1", linewidth=1.0, linestyle=(0, (3, 2)))
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


def _draw_by_position(axes: Axes, curves: Curves) -> None:
    """A line a stage and modality; a doubling of the position is as wide as any other."""
    found = {modality: curves.by_position(modality) for modality, _, _ in MODALITIES}
    starts = {start for scored in found.values() for losses in scored.values() for start in losses}
    # Each bucket is as long as all before it: the second one's start is the first one's length.
    length = min((start for start in starts if start), default=1)
    spans = [span for span in curves.spans if any(span in scored for scored in found.values())]
    for order, span in enumerate(spans):  # modalities within: a row of the legend each
        for modality, color, marker in MODALITIES:
            losses = found[modality].get(span, {})
            axes.plot(
                [(start // length).bit_length() + 0.5 for start in losses],
                list(losses.values()),
                color=color,
                alpha=1.0 - 0.6 * (len(spans) - 1 - order) / max(1, len(spans) - 1),
                linewidth=1.8,
                marker=marker,
                markersize=4.5,
                label=f"{modality}, {span.name}" if losses else "_nolegend_",
            )
    ends = (max(starts) // length).bit_length() + 1
    labels = ["0", *(format_tokens(length << place) for place in range(ends))]
    axes.set_xlim(0, ends)
    axes.set_xticks(range(ends + 1), labels)
    axes.set_xlabel("tokens into the document", fontsize=9, color=INK)
    axes.set_ylabel("held-out loss, nats a token", fontsize=9, color=INK)
    axes.margins(y=0.1)


FIGURES = (
    FigureKind(
        "loss",
        "Loss by modality",
        "Points are steps, lines their running mean; shaded bands are the stages of the "
        "curriculum. Open markers are the loss on held-out rows at a stage's end. A dashed line is "
        "the entropy of those rows' own token frequencies: a model below it knows more of them "
        "than which tokens are common. "
        "A step up at a band's edge is the price of a longer context, and should heal.",
        _draw_loss,
        ("loss_text", "loss_vision"),
        wide=True,
    ),
    FigureKind(
        "curriculum",
        "Loss over the curriculum",
        "The loss that is trained on, over all tokens of the run, a colour a stage. Beside each "
        "stage stand its context length and its RoPE base.",
        _draw_curriculum,
        ("loss",),
        wide=True,
    ),
    FigureKind(
        "position",
        "Held-out loss by position in its document",
        "The held-out loss of each stage's end, for the tokens that stand so far into their "
        "document (a text that is longer than the context begins anew in every row). A line that "
        "falls to the right says that the model uses what it read before; the pale lines are the "
        "earlier stages.",
        _draw_by_position,
        over="position",
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
