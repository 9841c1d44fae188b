"""How far a data build is: a bar a phase in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ringworld_platform.formatting import duration, quantity

LINE_SECONDS = 10.0
"""Without a terminal, a phase that goes on says how far it is so often."""


class BuildDisplay(Protocol):
    """Told of progress; see ``ringworld_workers.data.work.Progress``."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show it."""


@contextmanager
def build_display(console: Console) -> Iterator[BuildDisplay]:
    """Bars or lines, whichever the console can show."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield _Bars(bars)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{quantity(speed)}/s" if speed else "", style="progress.data.speed")


class _Bars:
    """A bar a phase; a phase ends where the next one begins."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._phase = ""
        self._bar: TaskID | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase or self._bar is None:
            self._finish()
            self._phase, self._bar = phase, self._bars.add_task(phase, total=total or None)
        self._bars.update(self._bar, completed=done, total=total or None)

    def _finish(self) -> None:
        if self._bar is not None:
            task = self._bars.tasks[self._bar]
            total = task.total or max(1.0, task.completed)
            self._bars.update(self._bar, total=total, completed=total)


class _Lines:
    """A line where a phase begins, and now and then while it goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._began = self._told = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began, self._told = phase, now, now
            self._console.print(phase, markup=False)
        elif total and now - self._told >= LINE_SECONDS:
            self._told = now
            speed = done / (now - self._began)
            left = duration((total - done) / speed) if speed else "-"
            line = f"{phase}: {done}/{total}, {quantity(speed)}/s, {left} left"
            self._console.print(line, markup=False)
