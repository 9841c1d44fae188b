"""The table of runs that `ringworld list` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ringworld_platform.display import STATE_STYLES, stage_number
from ringworld_platform.formatting import duration, loss
from ringworld_platform.run_records import Record


def runs_table(runs: Sequence[Record]) -> Table:
    """One row a run, in the order given.

    What only some runs have is a column only where one has it: the line where a run waits in it,
    priorities where they differ.

    Args:
        runs: states, as a view's ``list`` gives them.
    """
    line = any(run.get("place") for run in runs)
    priorities = len({run.get("priority", 0) for run in runs}) > 1
    table = Table(box=None, header_style="dim", pad_edge=False)
    headings = ["run", "state", "stage", "step", "loss"]
    headings += ["priority"] * priorities + ["line", "starts"] * line
    for heading in headings:
        right = heading in ("priority", "line")
        table.add_column(heading, no_wrap=True, justify="right" if right else "left")
    table.add_column("why")
    for run in runs:
        state = str(run.get("state"))
        cells = [
            Text(str(run["run_id"])),
            Text(state, STATE_STYLES.get(state, "bold")),
            Text(f"{run.get('stage') or '-'} ({stage_number(run)})"),
            Text(f"{run.get('step')}/{run.get('num_steps')}"),
            Text(loss(run.get("loss"))),
        ]
        if priorities:
            cells.append(Text(str(run.get("priority", 0))))
        if line:
            cells += [Text(str(run.get("place") or "")), Text(_starts(run))]
        table.add_row(*cells, Text(_why(run)))
    return table


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
