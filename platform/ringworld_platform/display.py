"""A run in the terminal: a live view where there is one, plain lines where there is none."""

from __future__ import annotations

import re
import time
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ringworld_jobs.units import format_tokens
from ringworld_platform.charts import sparkline
from ringworld_platform.event_lines import CARE, TROUBLE, kind_style
from ringworld_platform.formatting import duration, loss, quantity
from ringworld_platform.keys import Keys
from ringworld_platform.loss_chart import COLOURS
from ringworld_platform.progress import RunProgress
from ringworld_platform.run_records import Record

STATE_STYLES = {
    "SUCCEEDED": "bold green",
    "FAILED": "bold red",
    "RUNNING": "bold cyan",
    "RECOVERING": "bold yellow",
    "WAITING": "yellow",
    "STOPPING": "yellow",
}
LINES_PER_STAGE = 10
_COUNT = re.compile(r" \d+/\d+$|; waiting \d+ min$|; \d+ of \d+ (is|are) free.*$")


class Display(Protocol):
    """Shows a run; ``update`` after every poll."""

    def update(self, progress: RunProgress) -> None:
        """Show what the last poll brought."""

    def note(self, text: str) -> None:
        """Say something once."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainDisplay:
    """Lines for pipes and CI: every event, and about ten steps of each stage."""

    def __init__(self, console: Console) -> None:
        """Take the console to print on."""
        self._console = console
        self._last_reason = ""

    def update(self, progress: RunProgress) -> None:
        """See ``Display``."""
        for event in progress.new_events:
            self.note(event_line(event))
        # A count that moves on (".. 32/76") is not news; what is being done is.
        reason = _COUNT.sub("", str(progress.status.get("reason") or ""))
        told = any(reason in str(event.get("text")) for event in progress.new_events)
        if reason != self._last_reason and not told:
            self.note(reason)
        self._last_reason = reason
        for record in progress.new_records:
            if record.get("kind") == "step" and _worth_a_line(record, progress):
                self.note(step_line(record, progress))
            elif record.get("kind") == "validation":
                self.note(validation_line(record))

    def note(self, text: str) -> None:
        """See ``Display``."""
        if text:
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """See ``Display``."""


class LiveDisplay:
    """A few lines that stay at the bottom of the terminal, events scrolling above them."""

    def __init__(self, console: Console) -> None:
        """Take over the lower end of the terminal."""
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        # Ctrl-C would be echoed as ^C into the panel, and leave a piece of it behind.
        self._keys = Keys()
        self._keys.__enter__()
        self._live.start()

    def update(self, progress: RunProgress) -> None:
        """See ``Display``."""
        for event in progress.new_events:
            style = kind_style(event)
            # What is no trouble is not to distract from the panel.
            plain = style if style in (TROUBLE, CARE) else "dim"
            self._console.print(Text(event_line(event), style=plain))
        for record in progress.new_records:
            if record.get("kind") == "validation":
                self._console.print(Text(validation_line(record), style="green"))
        self._live.update(compact_view(progress), refresh=True)

    def note(self, text: str) -> None:
        """See ``Display``."""
        self._console.print(Text(text, style="yellow"))

    def close(self) -> None:
        """See ``Display``."""
        self._live.stop()
        self._keys.__exit__(None, None, None)


def open_display(console: Console) -> Display:
    """The live view on a terminal, plain lines elsewhere."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def event_line(event: Record) -> str:
    """An event with its time of day."""
    clock = time.strftime("%H:%M:%S", time.localtime(float(event.get("time", 0))))
    return f"{clock}  {event.get('text') or event.get('kind')}"


def step_line(record: Record, progress: RunProgress) -> str:
    """A step as one line."""
    losses = [f"{m} {loss(record[f'loss_{m}'])}" for m in _modalities(record)]
    left = duration(progress.status.get("eta_seconds"))
    return (
        f"stage {record.get('stage')} step {record.get('step')}/{_num_steps(record, progress)}  "
        f"loss {loss(record.get('loss'))} ({', '.join(losses)})  "
        f"{quantity(record.get('tokens_per_second'))} tokens/s  {left} left"
    )


def validation_line(record: Record) -> str:
    """A stage's held-out score as one line."""
    parts = [
        f"{m} {loss(record[f'loss_{m}'])} "
        f"(guessing by frequency {loss(record.get(f'unigram_entropy_{m}'))})"
        for m in _modalities(record)
    ]
    return f"          stage {record.get('stage')} held out: {', '.join(parts)}"


def compact_view(progress: RunProgress) -> RenderableType:
    """The live lines of ``run``: where it is, the losses, the pace, the workers."""
    status = progress.status
    lines: list[RenderableType] = [headline(status)]
    if status.get("num_steps"):
        lines.append(_bar(status))
    if progress.steps:
        lines.append(_losses(progress))
        # A stage that is still starting has no pace of its own.
        if progress.last("stage_index") == status.get("stage_index"):
            lines.append(_pace(progress))
    if status.get("workers"):
        lines.append(_workers_line(status))
    return Panel(Group(*lines), border_style="dim", padding=(0, 1))


def headline(status: Record) -> Text:
    """Run, state, stage and why."""
    state = str(status.get("state", "?"))
    line = Text.assemble(
        (str(status.get("run_id")), "bold"), "  ", (state, STATE_STYLES.get(state, "bold"))
    )
    if status.get("stage"):
        line.append(f"  stage {status['stage']} ({stage_number(status)})")
    if status.get("context_length"):
        line.append(f"  {format_tokens(int(status['context_length']))} tokens")
    if status.get("ring_size"):
        split = int(status.get("heads_size") or 1)
        heads = f" x heads {split}" if split > 1 else ""
        line.append(f"  ring {status['ring_size']}{heads} x dp {status.get('data_parallel_size')}")
    if int(status.get("attempt") or 0) > 1:
        line.append(f"  attempt {status['attempt']}", style="yellow")
    if status.get("reason"):
        line.append(f"\n{status['reason']}", style="dim")
    return line


def stage_number(status: Record) -> str:
    """Which of how many stages: ``2/3``. A finished run counts one beyond its last stage."""
    total = int(status.get("num_stages") or 0)
    return f"{min(int(status.get('stage_index') or 0) + 1, total)}/{total}"


def parity_lines(progress: RunProgress) -> list[str]:
    """A line a stage that has proved its ring, or has failed to."""
    lines = []
    for _, records in sorted(progress.stages.items()):
        proof = records.get("parity")
        if proof is None:
            continue
        error, limit = proof.get("gradient_error"), proof.get("gradient_limit")
        how = ", ".join(str(proof.get(key)) for key in ("precision", "layout", "backend"))
        lines.append(
            f"stage {proof.get('stage')} {'passed' if proof.get('passed') else 'FAILED'}: "
            f"gradients off by at most {_scientific(error)} of {_scientific(limit)} allowed "
            f"({proof.get('worst_parameter')}; {how}; {duration(proof.get('check_seconds'))})"
        )
    return lines


def _scientific(value: float | None) -> str:
    return "?" if value is None else f"{value:.1e}"


def _bar(status: Record) -> Table:
    done, total = int(status.get("step") or 0), int(status.get("num_steps") or 1)
    row = Table.grid(padding=(0, 1))
    seconds = status.get("eta_seconds")
    left = f"about {duration(seconds)} left in all" if seconds else ""
    row.add_row(
        f"step {done}/{total}", ProgressBar(total=total, completed=done, width=36), Text(left)
    )
    return row


def _losses(progress: RunProgress) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row("loss", Text(loss(progress.last("loss")), style="bold"), "")
    for modality, colour in COLOURS.items():
        values = progress.series(f"loss_{modality}")
        if values:
            line = Text(sparkline(values, 36), style=colour)
            row.add_row(f"  {modality}", loss(values[-1]), line)
    return row


def _pace(progress: RunProgress) -> Text:
    last = progress.last
    parts = [
        f"{quantity(last('tokens_per_second'))} tokens/s",
        f"step {duration(last('step_seconds'))}",
        f"gradient norm {loss(last('grad_norm'))}",
        f"learning rate {last('learning_rate') or 0:.2e}",
    ]
    if last("ring_bytes_sent"):
        wait, compute = last("ring_wait_seconds"), last("ring_compute_seconds")
        parts.append(f"ring {compute or 0:.2f}s, wait {wait or 0:.2f}s")
    # No-break spaces: a narrow terminal breaks the line between two figures, not inside one.
    return Text("  ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts), style="dim")


def _workers_line(status: Record) -> Text:
    workers = status.get("workers") or []
    shown = "  ".join(f"rank {w['rank']} {w['phase']} {w['step']}" for w in workers[:6])
    return Text(shown + (f"  and {len(workers) - 6} more" if len(workers) > 6 else ""), style="dim")


def _modalities(record: Record) -> list[str]:
    return [m for m in ("text", "vision") if record.get(f"loss_{m}") is not None]


def _num_steps(record: Record, progress: RunProgress) -> int:
    start = progress.stages.get(int(record.get("stage_index", 0)), {}).get("stage_start", {})
    return int(start.get("num_steps") or progress.status.get("num_steps") or 0)


def _worth_a_line(record: Record, progress: RunProgress) -> bool:
    total, step = _num_steps(record, progress), int(record.get("step", 0))
    return step == 1 or step == total or step % max(1, total // LINES_PER_STAGE) == 0
