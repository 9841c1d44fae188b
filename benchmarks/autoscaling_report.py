"""The table and the picture of benchmarks/autoscaling.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringworld_platform.plot_style import (
    BLUE,
    DOTS_PER_INCH,
    GREY,
    INK,
    ORANGE,
    SKY,
    VERMILION,
    finish,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The nodes at one time (seconds since the epoch), and the bundles of the request then."""

    time: float
    busy: int
    idle: int
    pending: int
    requested: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: when its gang had room, and when its first and its last step were done."""

    name: str
    workers: int
    room: float
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the job.

    Attributes:
        prewarm: as the job's spec has it.
        began: when it was submitted.
        ended: when it succeeded.
        stages: in order.
        asked: when nodes were asked for before they were needed.
        samples: in order.
    """

    prewarm: str
    began: float
    ended: float
    stages: tuple[Stage, ...]
    asked: tuple[float, ...]
    samples: Sequence[Sample]

    def waits_for_room(self) -> list[float]:
        """Seconds from a stage's last step, or the submission, to the room for the next one."""
        before = [self.began, *(stage.last for stage in self.stages[:-1])]
        return [stage.room - end for stage, end in zip(self.stages, before, strict=True)]

    def waits(self) -> list[float]:
        """Seconds from a stage's last step, or the submission, to the next one's first."""
        before = [self.began, *(stage.last for stage in self.stages[:-1])]
        return [stage.first - end for stage, end in zip(self.stages, before, strict=True)]

    def grows(self, place: int) -> bool:
        """Whether a stage has more workers than the one before it."""
        return self.stages[place].workers > self.stages[place - 1].workers

    def idle(self) -> list[float]:
        """Idle node-seconds from each stage's last step (first: from the submission) to the next's.

        The last figure is what comes after the job's last step.
        """
        edges = [self.began, *(stage.last for stage in self.stages), float("inf")]
        return [
            sum(
                sample.idle * (after.time - sample.time)
                for sample, after in zip(self.samples, self.samples[1:], strict=False)
                if first <= sample.time < last
            )
            for first, last in zip(edges, edges[1:], strict=False)
        ]


def write(
    trials: Sequence[Trial], about: Mapping[str, Any], results: Path, picture: Path | None
) -> None:
    """Write the result beside the others, and print the table."""
    results.mkdir(parents=True, exist_ok=True)
    name = results / f"autoscaling-{'train-' if about['train'] else ''}{date.today().isoformat()}"
    text = "\n".join(_lines(trials, about))
    name.with_suffix(".md").write_text(text, encoding="utf-8")
    # What has not changed since the sample before says nothing.
    kept = [{**asdict(trial), "samples": _changes(trial.samples)} for trial in trials]
    content = {"about": dict(about), "trials": kept}
    name.with_suffix(".json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    draw(trials, picture or name.with_suffix(".png"))
    print(text)


def _changes(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    found: list[Sample] = []
    for sample in samples:
        if not found or replace(found[-1], time=sample.time) != sample:
            found.append(sample)
    return [asdict(sample) for sample in (*found, samples[-1])]


def _lines(trials: Sequence[Trial], about: Mapping[str, Any]) -> list[str]:
    loop = "the real training loop" if about["train"] else "the tests' loop without a model"
    first, last = about["load"]
    lines = [
        "# Autoscaling: a job whose stages take 1, 2, 4 and 1 workers",
        "",
        f"`python benchmarks/autoscaling.py`, {date.today().isoformat()}, on {about['cores']} "
        f"cores (load {first} when it began, {last} when it ended). Ray's autoscaler v2, nodes of "
        "one CPU that are processes of this machine, removed after "
        f"{about['idle_seconds']:g} s idle; {about['steps']} steps a stage, {loop}.",
        "",
        "`room`: seconds from the last step of the stage before to the room for all workers; "
        "`step`: to the first step, with the start of the workers' processes; `idle`: node-seconds "
        "in which nobody used a node, from the last step before to the stage's own last.",
        "",
        "| resources.prewarm | stage | workers | room | step | idle |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for trial in trials:
        rooms, steps, idle = trial.waits_for_room(), trial.waits(), trial.idle()
        for place, stage in enumerate(trial.stages):
            figures = (rooms[place], steps[place], idle[place])
            row = (trial.prewarm, stage.name, str(stage.workers), *(f"{f:.1f}" for f in figures))
            lines.append(f"| {' | '.join(row)} |")
        grows = [place for place in range(1, len(trial.stages)) if trial.grows(place)]
        row = (
            trial.prewarm,
            "all that grow",
            "",
            f"{sum(rooms[place] for place in grows):.1f}",
            f"{sum(steps[place] for place in grows):.1f}",
            "",
        )
        lines.append(f"| {' | '.join(row)} |")
        total = f"{sum(idle):.1f}, {idle[-1]:.1f} of it after the end"
        lines.append(
            f"| {trial.prewarm} | the job, {trial.ended - trial.began:.0f} s | | | | {total} |"
        )
    return [*lines, ""]


def draw(trials: Sequence[Trial], path: Path) -> None:
    """Nodes against time, one panel a trial."""
    figure = Figure(figsize=(9.6, 3.1 * len(trials)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(trials), 1, sharex=True, squeeze=False)[:, 0]
    for axes, trial in zip(panels, trials, strict=True):
        _panel(axes, trial)
    panels[-1].set_xlabel("seconds from the submission", fontsize=9, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _panel(axes: Axes, trial: Trial) -> None:
    times = [sample.time - trial.began for sample in trial.samples]
    busy = [sample.busy for sample in trial.samples]
    idle = [sample.idle for sample in trial.samples]
    pending = [sample.pending for sample in trial.samples]
    top = 5.2
    for stage in trial.stages:
        first, last = stage.first - trial.began, stage.last - trial.began
        axes.axvspan(first, last, color="#F1F3F5", zorder=0, linewidth=0)
        axes.annotate(
            f"{stage.name}\n{stage.workers} worker{'s' * (stage.workers > 1)}",
            ((first + last) / 2, top),
            xytext=(0, -3),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color=GREY,
        )
    axes.stackplot(
        times,
        busy,
        idle,
        pending,
        step="post",
        colors=[BLUE, ORANGE, SKY],
        labels=["busy nodes", "idle", "on their way"],
        linewidth=0,
    )
    for number, moment in enumerate(trial.asked):
        axes.axvline(
            moment - trial.began,
            color=VERMILION,
            linewidth=1.4,
            linestyle=(0, (3, 2)),
            label="asked for ahead" if number == 0 else None,
        )
    axes.set_ylim(0, top)
    axes.set_yticks(range(5))
    axes.set_ylabel("nodes", fontsize=9, color=INK)
    title = f"resources.prewarm: {trial.prewarm}"
    axes.set_title(title, fontsize=9, color=INK, loc="right")
    finish(axes, wide=True)
