"""Every metric that Ray exports of ours: its name, its tags, what it means, where it is from.

Prometheus sees ``ray_`` before each name, and ``_total`` behind a counter's. A name ends in its
unit; without one it is a number, or a share of 1. Where the metric log has the figure, too, it has
the name of the field there.

    python -m ringworld_platform.telemetry_table docs/observability.md

writes the table into the page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringworld_workers.rank_gauges import RANK_SERIES, RANK_TAGS

STAGE_TAGS = ("run", "stage")
BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"


@dataclass(frozen=True, slots=True)
class Series:
    """A metric.

    Attributes:
        name: as Ray is told it.
        meaning: in a line.
        tags: names of them.
        source: field of the record that it is from; empty where it is reckoned.
        counter: it only grows, from 0 at the controller's start.
    """

    name: str
    meaning: str
    tags: tuple[str, ...] = ()
    source: str = ""
    counter: bool = False

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.counter else ''}"


def _of_step(source: str, meaning: str, name: str = "") -> Series:
    return Series(f"ringworld_{name or source}", meaning, STAGE_TAGS, source)


STEP_SERIES: Sequence[Series] = (
    _of_step("loss", "what the step descended on: text and vision mixed by the stage's weights"),
    _of_step("loss_text", "of text alone"),
    _of_step("loss_vision", "of vision alone"),
    _of_step("accuracy_text", "share of text tokens that were foretold"),
    _of_step("accuracy_vision", "share of vision tokens that were foretold"),
    _of_step("grad_norm", "of all gradients, before clipping"),
    _of_step("learning_rate", "of the step"),
    _of_step("step", "steps of the stage that are done"),
    _of_step("global_step", "steps of the run that are done"),
    _of_step("tokens", "tokens of the run that are done, those of redone steps once"),
    _of_step("tokens_per_second", "of the gang, without stalls for checkpoints"),
    _of_step("mfu", "model FLOPs to the GPUs' bf16 peak; none on CPU"),
    _of_step("model_flops_per_second", "of the gang: visible pairs only, nothing recomputed"),
    _of_step("step_seconds", "the whole step"),
    _of_step("data_seconds", "of this, waiting for the rows (rank 0)"),
    _of_step("forward_seconds", "of this, forward (rank 0)"),
    _of_step("backward_seconds", "of this, backward (rank 0)"),
    _of_step("optimizer_seconds", "of this, the optimizer with its collectives (rank 0)"),
    _of_step("checkpoint_stall_seconds", "of this, a checkpoint's snapshot"),
    _of_step("ring_compute_seconds", "attention's own work, mean of the ranks"),
    _of_step("ring_compute_max_seconds", "attention's own work on the slowest rank"),
    _of_step("ring_wait_seconds", "waiting for keys and values from the ring, mean of the ranks"),
    _of_step("ring_wait_max_seconds", "waiting for the ring, most of any rank"),
    _of_step("ring_bytes_sent", "sent around the ring, mean of the ranks", "ring_sent_bytes"),
    _of_step("padding_share", "of the step's positions that hold no document"),
    _of_step("plan_imbalance", "attention's work on the busiest rank to the mean"),
)
"""From the newest step's line of the metric log, while a gang is at work."""

CHECKPOINT_SERIES: Sequence[Series] = (
    _of_step("bytes", "size of the newest checkpoint", "checkpoint_bytes"),
    _of_step("upload_seconds", "its upload took, behind training", "checkpoint_seconds"),
    _of_step("stall_seconds", "training stood still for it", "checkpoint_snapshot_seconds"),
)
"""From the newest checkpoint's line of the metric log."""

RUN_SERIES: Sequence[Series] = (
    _of_step("context_length", "of the stage", "context_length_tokens"),
    _of_step("ring_size", "workers that share one sequence"),
    _of_step("data_parallel_size", "rings"),
    _of_step("num_steps", "of the stage"),
    _of_step("eta_seconds", "the run will still take, by its pace"),
    _of_step("attempt", "gangs that were built for the run"),
    _of_step("restarts", "since the newest checkpoint: the budget is recovery.max_restarts"),
)
"""From the run's state, which `ringworld status` shows."""

CHECKPOINT_AGE = Series(
    "ringworld_checkpoint_age_seconds",
    "since the newest checkpoint was committed, or the gang has begun: what a crash would cost",
    STAGE_TAGS,
)
RECOVERY = Series(
    "ringworld_recovery_seconds",
    "from the run's last failure to the next step that it made",
    STAGE_TAGS,
)
JOBS = Series("ringworld_jobs", "runs that this controller has, or has had", ("state",))
LINE = Series("ringworld_waiting_jobs", "runs in the line for workers")
WORKERS = Series("ringworld_workers", "that gangs hold")
LEASE = Series(
    "ringworld_lease_age_seconds",
    "since the last sign of life in the state of any run at work; at 30 others may take it",
)
MEMORY = Series("ringworld_controller_memory_bytes", "resident memory of the controller")
CPU = Series("ringworld_controller_cpu_seconds", "of the controller", counter=True)
TOKENS = Series("ringworld_trained_tokens", "in all runs, redone steps again", counter=True)
STEPS = Series("ringworld_trained_steps", "in all runs, redone steps again", counter=True)
RECOVERIES = Series(
    "ringworld_recoveries", "failures after which a run has made steps again", counter=True
)
EVENTS = Series(
    "ringworld_events",
    "lines of the event logs: failure, checkpoint, preempted, drain, slow, stage and others",
    ("kind",),
    counter=True,
)
CONTROLLER_SERIES: Sequence[Series] = (
    *(JOBS, LINE, WORKERS, LEASE, MEMORY, CPU),
    *(TOKENS, STEPS, RECOVERIES, EVENTS),
)
"""Of the controller itself."""

RANK_TABLE: Sequence[Series] = tuple(
    Series(name, text, RANK_TAGS) for name, text in RANK_SERIES.items()
)
"""Of each rank, set by its own process."""

SECTIONS: Sequence[tuple[str, Sequence[Series]]] = (
    ("The newest step, while a gang is at work", STEP_SERIES),
    ("The run", (*RUN_SERIES, *CHECKPOINT_SERIES, CHECKPOINT_AGE, RECOVERY)),
    ("Each rank, exported by its own node", RANK_TABLE),
    ("The controller", CONTROLLER_SERIES),
)


def all_series() -> list[Series]:
    """Every metric there is."""
    return [series for _, section in SECTIONS for series in section]


def as_markdown() -> str:
    """The table for the page on observability."""
    lines: list[str] = []
    for title, section in SECTIONS:
        lines += [f"**{title}**", "", "| metric | tags | what it is |", "| --- | --- | --- |"]
        for series in section:
            tags = ", ".join(series.tags)
            lines.append(f"| `{series.exported}` | {tags} | {series.meaning} |")
        lines.append("")
    return "\n".join(lines).strip()


def with_table(page: str) -> str:
    """A page with the table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{begin}\n{as_markdown()}\n{end}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text(encoding="utf-8")), encoding="utf-8")
