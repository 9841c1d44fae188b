"""The runs that `ringworld list` prints: which of them, in which order, and how they are laid out.

A run's id is never cut, because other commands want it; nor is the reason, because it is what a
look at the line is for. Where a terminal is too narrow for both in a row, the reason goes below.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

from rich.text import Text

from ringworld_platform.display import STATE_STYLES, stage_number
from ringworld_platform.formatting import duration, loss
from ringworld_platform.run_records import Record
from ringworld_platform.run_state import TERMINAL

ENDED_SHOWN = 20
"""Runs that have ended and are shown unasked: the newest."""
WHY_WIDTH = 40
"""A reason that has less than this gets lines of its own."""
_GAP = "  "
_INDENT = "    "
_NUMBERS = frozenset({"priority", "line"})


def chosen_runs(
    runs: Sequence[Record], states: Collection[str] = (), *, everything: bool = False
) -> tuple[list[Record], int]:
    """Pick the runs to show, and put the line in its order.

    First those that have ended, then those at work, both from the oldest to the newest; then the
    line, its first place first. So what matters most stands nearest to the prompt.

    Args:
        runs: states, as a view's ``list`` gives them: oldest first.
        states: only runs in one of these; none means all.
        everything: show also the runs that ended long ago.

    Returns:
        The runs, and how many that have ended were left out.
    """
    wanted = [run for run in runs if not states or run.get("state") in states]
    ended = [run for run in wanted if run.get("state") in TERMINAL]
    going = [run for run in wanted if run.get("state") not in TERMINAL]
    left_out = 0 if everything or states else max(0, len(ended) - ENDED_SHOWN)
    going.sort(key=lambda run: int(run.get("place") or 0))
    return ended[left_out:] + going, left_out


def runs_table(runs: Sequence[Record], width: int | None = None) -> Text:
    """One row a run, in the order given.

    What only some runs have is a column only where one has it: the line where a run waits in it,
    priorities where they differ.

    Args:
        runs: states, as a view's ``list`` gives them.
        width: of the terminal, in characters; None puts each run into one line, however long.
    """
    headings, rows = _cells(runs, short=False)
    beside = width is None or width - _width_of(headings, rows) - len(_GAP) >= WHY_WIDTH
    if not beside:
        headings, rows = _cells(runs, short=True)
    sizes = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    if not beside and width is not None:
        others = sum(len(_GAP) + size for size in sizes[1:])
        sizes[0] = max(len("run"), min(sizes[0], width - others))
    head = _row(headings, headings, sizes) + (f"{_GAP}why" if beside else "")
    parts = [Text(head.rstrip(), style="dim")]
    for run, cells in zip(runs, rows, strict=True):
        line = Text()
        if len(cells[0]) > sizes[0]:
            line.append(cells[0] + "\n")
            cells = ["", *cells[1:]]
        row = _row(headings, cells, sizes)
        why = _why(run)
        if beside:
            row += _GAP + _wrapped(why, len(row + _GAP), width)
        line.append(row.rstrip())
        state = sizes[0] + len(_GAP)
        before = len(line.plain) - len(row.rstrip())
        style = STATE_STYLES.get(cells[1], "bold")
        line.stylize(style, before + state, before + state + len(cells[1]))
        if why and not beside and run.get("state") != "SUCCEEDED":
            below = _wrapped(why, len(_INDENT), width)
            line.append(f"\n{_INDENT}{below}", style="dim")
        parts.append(line)
    return Text("\n").join(parts)


def _cells(runs: Sequence[Record], *, short: bool) -> tuple[list[str], list[list[str]]]:
    """Headings, and what stands under them; where room is short, a stage has no name."""
    line = any(run.get("place") for run in runs)
    priorities = len({run.get("priority", 0) for run in runs}) > 1
    headings = ["run", "state", "stage", "step", "loss"]
    headings += ["priority"] * priorities + ["line", "starts"] * line
    rows = []
    for run in runs:
        number = stage_number(run)
        cells = [
            str(run["run_id"]),
            str(run.get("state")),
            number if short else f"{run.get('stage') or '-'} ({number})",
            f"{run.get('step')}/{run.get('num_steps')}",
            loss(run.get("loss")),
        ]
        cells += [str(run.get("priority", 0))] * priorities
        cells += [str(run.get("place") or ""), _starts(run)] * line
        rows.append(cells)
    return headings, rows


def _width_of(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    sizes = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return sum(sizes) + len(_GAP) * (len(sizes) - 1)


def _row(headings: Sequence[str], cells: Sequence[str], sizes: Sequence[int]) -> str:
    padded = [
        cell.rjust(size) if heading in _NUMBERS else cell.ljust(size)
        for heading, cell, size in zip(headings, cells, sizes, strict=True)
    ]
    return _GAP.join(padded)


def _wrapped(why: str, column: int, width: int | None) -> str:
    """A reason in lines that begin at this column; names in it are never broken."""
    if width is None:
        return " ".join(why.split())
    room = max(WHY_WIDTH, width - column)
    lines = textwrap.wrap(why, room, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * column}".join(lines)


def _starts(run: Record) -> str:
    """When a run that waits is likely to have its workers."""
    if not run.get("place"):
        return ""
    seconds = run.get("start_seconds")
    if seconds is None:
        return "?"
    return f"in {duration(seconds)}" if seconds >= 1 else "soon"


def _why(run: Record) -> str:
    """Why a run is in its state: what failed it, else its reason; an error it got over is past."""
    failed = run.get("state") == "FAILED"
    return str((run.get("error") if failed else None) or run.get("reason") or "")
