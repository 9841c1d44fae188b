"""The report of a run: what each stage did, as a table in the terminal and as one HTML file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringworld_jobs.units import format_tokens, parse_count
from ringworld_platform.evaluation_records import evaluation_lines
from ringworld_platform.formatting import duration, loss, mesh_heading, mesh_text, quantity
from ringworld_platform.predictions import comparison_lines
from ringworld_platform.proofs import read_proofs
from ringworld_platform.report_evaluations import shown_tasks
from ringworld_platform.run_records import (
    REPORT_FILE,
    SPEC_FILE,
    Record,
    RunRecords,
    read_run,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ringworld_platform.plots import Plot

ENDS = 3
"""Steps that a first and a last loss are averaged over; fewer in a very short stage."""


@dataclass(frozen=True, slots=True)
class ModalityResult:
    """One modality of one stage; every value in nats a token.

    Attributes:
        modality: text or vision.
        first: mean of the first steps' losses.
        last: mean of the last steps' losses.
        validation: loss on held-out rows, None without one.
        baseline: entropy of the token frequencies of the same rows.
    """

    modality: str
    first: float
    last: float
    validation: float | None
    baseline: float | None

    @property
    def beats_guessing(self) -> bool | None:
        """Whether the held-out loss is below the frequencies' entropy; None when not measured."""
        if self.validation is None or self.baseline is None:
            return None
        return self.validation < self.baseline


@dataclass(frozen=True, slots=True)
class StageResult:
    """What one stage did."""

    index: int
    name: str
    context_length: int
    ring_size: int | None
    heads_size: int
    data_parallel_size: int | None
    steps: int
    num_steps: int
    tokens: int
    modalities: tuple[ModalityResult, ...]
    tokens_per_second: float | None
    wall_seconds: float
    attempts: int
    """Gangs that worked on the stage."""
    checkpoint: str | None

    @property
    def context(self) -> str:
        """The context length as people write it."""
        return format_tokens(self.context_length)

    @property
    def mesh(self) -> str:
        """The size of each mesh axis; a dash where the stage has not begun."""
        if not self.ring_size:
            return "-"
        return mesh_text(self.ring_size, self.heads_size, self.data_parallel_size)


@dataclass(frozen=True, slots=True)
class Report:
    """What one run did.

    Attributes:
        run: the records that it was made from.
        stages: one result a stage of the spec, those not begun included.
        told_state: the state to show, for a report that is made just before it is saved.
    """

    run: RunRecords
    stages: tuple[StageResult, ...]
    told_state: str = ""

    @property
    def state(self) -> str:
        """The run's state: as told, else the last one saved."""
        return self.told_state or str(self.run.state.get("state") or "UNKNOWN")

    @property
    def steps(self) -> int:
        """Optimizer steps done, redone ones counted once."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens consumed, padding included."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def wall_seconds(self) -> float:
        """Time in stages, pauses between attempts left out."""
        return sum(stage.wall_seconds for stage in self.stages)

    @property
    def restarts(self) -> int:
        """Times that a stage was begun again, after a failure or a stop."""
        return sum(max(0, stage.attempts - 1) for stage in self.stages)


def build_report(run_folder: Path) -> Report:
    """Read a run folder and sum it up.

    Args:
        run_folder: a run folder, of a finished or a running job.

    Raises:
        FileNotFoundError: it does not exist.
    """
    run = read_run(run_folder)
    steps = run.steps()
    names = [str(stage.get("name", index)) for index, stage in enumerate(run.stages)]
    if not names:  # the spec is lost: what ran still tells
        seen = {int(step["stage_index"]): str(step.get("stage")) for step in steps}
        names = [seen.get(index, str(index)) for index in range(max(seen, default=-1) + 1)]
    return Report(run, tuple(_stage(run, steps, index, name) for index, name in enumerate(names)))


def _stage(run: RunRecords, all_steps: Sequence[Record], index: int, name: str) -> StageResult:
    steps = [step for step in all_steps if int(step.get("stage_index", 0)) == index]
    records = [record for record in run.records if record.get("stage_index") == index]
    starts = [record for record in records if record.get("kind") == "stage_start"]
    start = starts[-1] if starts else {}
    spec = run.stages[index] if index < len(run.stages) else {}
    before = max(
        (int(s.get("tokens", 0)) for s in all_steps if s["stage_index"] < index), default=0
    )
    validation = next((r for r in reversed(records) if r.get("kind") == "validation"), {})
    saved = [r for r in records if r.get("kind") in ("checkpoint", "stage_end")]
    keys = [r.get("key") or r.get("checkpoint") for r in saved]
    rates = [float(rate) for step in steps if (rate := step.get("tokens_per_second")) is not None]
    context = start.get("context_length") or parse_count(spec.get("context_length", 0))
    return StageResult(
        index=index,
        name=name,
        context_length=int(context),
        ring_size=start.get("ring_size"),
        heads_size=int(start.get("heads_size") or 1),
        data_parallel_size=start.get("data_parallel_size"),
        steps=len(steps),
        num_steps=int(start.get("num_steps") or spec.get("steps") or len(steps)),
        tokens=int(steps[-1].get("tokens", before)) - before if steps else 0,
        modalities=tuple(
            result for m in ("text", "vision") if (result := _modality(m, steps, validation))
        ),
        tokens_per_second=statistics.median(rates) if rates else None,
        wall_seconds=_wall_seconds(records),
        attempts=len({record.get("attempt", 1) for record in records}),
        checkpoint=next((str(key) for key in reversed(keys) if key), None),
    )


def _modality(modality: str, steps: Sequence[Record], validation: Record) -> ModalityResult | None:
    name = f"loss_{modality}"
    losses = [float(step[name]) for step in steps if step.get(name) is not None]
    if not losses:
        return None
    ends = max(1, min(ENDS, len(losses) // 2))  # the two ends share no step
    return ModalityResult(
        modality,
        statistics.fmean(losses[:ends]),
        statistics.fmean(losses[-ends:]),
        validation.get(name),
        validation.get(f"unigram_entropy_{modality}"),
    )


def _wall_seconds(records: Sequence[Record]) -> float:
    """Sum over the attempts, so that a night between stop and resume does not count."""
    by_attempt: dict[int, list[float]] = {}
    setup = 0.0
    for record in records:
        if "time" in record:
            by_attempt.setdefault(int(record.get("attempt", 1)), []).append(float(record["time"]))
        if record.get("kind") == "stage_start":
            setup += float(record.get("setup_seconds", 0.0))
    return setup + sum(max(times) - min(times) for times in by_attempt.values())


def render_terminal(report: Report) -> RenderableType:
    """The stages as a rich table, with a line on each modality of the last stage that ran."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text.assemble((report.run.run_id, "bold"), f"  {report.state.lower()}")
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    left = {"stage", "modality"}
    for heading in (
        *("stage", "context", "mesh", "steps", "modality", "first", "last", "held out"),
        *("tokens/s", "time"),
    ):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for stage in report.stages:
        for row in _terminal_rows(stage):
            table.add_row(*row)
    saved = [stage.checkpoint for stage in report.stages if stage.checkpoint]
    lines = verdicts(report)
    lines += (f"Evaluated: {line}." for line in evaluation_lines(report.run.events))
    lines += (f"Measured, {line}." for line in comparison_lines(report.run.events))
    if saved:
        lines.append(f"Checkpoints: {', '.join(saved)}.")
    tables = [table] if report.stages else []
    return Group(title, *tables, *(Text(line) for line in lines))


def _terminal_rows(stage: StageResult) -> list[list[str]]:
    left = [
        stage.name,
        stage.context,
        stage.mesh.replace(" ", ""),
        f"{stage.steps}/{stage.num_steps}",
    ]
    right = [quantity(stage.tokens_per_second), duration(stage.wall_seconds)]
    if not stage.modalities:
        return [[*left, "not begun" if not stage.steps else "", "", "", "", "-", "-"]]
    rows = []
    for result in stage.modalities:
        middle = [result.modality, loss(result.first), loss(result.last), loss(result.validation)]
        rows.append([*left, *middle, *right])
        left, right = [""] * 4, [""] * 2
    return rows


def verdicts(report: Report) -> list[str]:
    """What the figures mean, in sentences: one a modality, from the last stage that scored it."""
    found: dict[str, str] = {}
    for stage in report.stages:
        for result in stage.modalities:
            if result.validation is None or result.baseline is None:
                continue
            than = "below" if result.beats_guessing else "NOT below"
            found[result.modality] = (
                f"{result.modality.capitalize()}: held-out loss {loss(result.validation)} after "
                f"stage {stage.name}, {than} the {loss(result.baseline)} of guessing by "
                "those rows' own token frequencies."
            )
    sentences = list(found.values())
    for wanted, verdict in ((True, "gives"), (False, "does NOT give")):
        proved = [
            stage
            for stage, proofs in read_proofs(report.run.folder).items()
            if "preflight" in proofs and proofs["preflight"]["passed"] is wanted
        ]
        if proved:
            sentences.append(
                f"Parity: the ring of {', '.join(proved)} {verdict} one worker's loss and "
                "gradients, checked before training."
            )
    redone = [stage for stage in report.stages if stage.attempts > 1]
    if redone:
        which = ", ".join(f"{stage.name} ({stage.attempts} attempts)" for stage in redone)
        sentences.append(f"Continued from a checkpoint in: {which}.")
    return sentences


def write_report(run_folder: Path, *, state: str = "") -> Path:
    """Draw the plots and write ``report.html``, one file that needs nothing else.

    Args:
        run_folder: a run folder; ``plots/*.png`` and ``report.html`` are written into it.
        state: the run's state, where the folder does not have the last one yet.

    Returns:
        Path of the HTML file.

    Raises:
        FileNotFoundError: the run folder does not exist.
        OSError: it cannot be written.
    """
    from ringworld_platform.plots import write_plots

    report = replace(build_report(run_folder), told_state=state)
    text = render_html(report, write_plots(report.run))
    path = run_folder / REPORT_FILE
    scratch = path.with_suffix(".html.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
    return path


def render_html(report: Report, plots: Sequence[Plot]) -> str:
    """The HTML text; every value from outside is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ringworld_platform"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "loss": loss,
        "quantity": quantity,
        "error": lambda value: "none" if value is None else f"{value:.1e}",
        "clock": lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)),
    }
    spec_path = report.run.folder / SPEC_FILE
    values: dict[str, Any] = {
        "report": report,
        "mesh": mesh_heading(stage.heads_size for stage in report.stages),
        "plots": plots,
        "verdicts": verdicts(report),
        "proofs": read_proofs(report.run.folder),
        "comparisons": comparison_lines(report.run.events),
        "evaluations": shown_tasks(report.run.folder),
        "events": report.run.events,
        "error": report.run.state.get("error"),
        "spec_text": spec_path.read_text(encoding="utf-8") if spec_path.is_file() else "",
        "written": time.time(),
    }
    return environment.get_template("report.html").render(values)
