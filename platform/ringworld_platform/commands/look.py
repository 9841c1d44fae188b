"""status, list, report: look at runs, and change nothing."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.commands.options import (
    DEFAULT_RUNS,
    Address,
    Json,
    NewestRun,
    Runs,
    StoreUrl,
)
from ringworld_platform.console import err, out

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ringworld_platform.run_view import OpenView

MOST_WIDTH = 120
"""Of the tables of `status`: also on a terminal that is wider, a row is to be read as one."""
MOST_RANKS = 40
"""Lines of `status` on the ranks; of more ranks, the odd ones are shown."""


def status(
    job: NewestRun = None,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Show where a run stands: state and why, stage, losses, workers, newest checkpoint."""
    from ringworld_platform.run_view import find_status, open_view
    from ringworld_platform.store_view import split_url

    job, store = split_url(job, store)
    with open_view(runs, address, store) as opened:
        found = find_status(opened.view, job)
        if as_json:
            typer.echo(json.dumps(found, indent=1))
            return
        _say_where(opened)
        from rich.console import Group
        from rich.text import Text

        from ringworld_platform.display import headline, parity_lines
        from ringworld_platform.evaluation_records import evaluation_lines
        from ringworld_platform.formatting import duration
        from ringworld_platform.predictions import comparison_lines
        from ringworld_platform.progress import RunProgress
        from ringworld_platform.ring_lines import ring_lines
        from ringworld_platform.stage_lines import stage_lines

        progress = RunProgress(opened.view, str(found["run_id"]))
        progress.poll()
        lines = [f"parity      {line}" for line in parity_lines(progress)]
        lines += [f"measured    {line}" for line in comparison_lines(progress.events)]
        lines += [f"evaluated   {line}" for line in evaluation_lines(progress.events)]
        lines += [f"checkpoint  {found.get('checkpoint') or 'none yet'}"]
        if found.get("eta_seconds") and not progress.ended:
            lines.append(f"time left   {duration(found['eta_seconds'])}")
        if found.get("stall_limit_seconds") and not progress.ended:
            lines.append(f"stall       after {duration(found['stall_limit_seconds'])} of silence")
        if found.get("tracking_problem"):
            lines.append(f"mlflow      {found['tracking_problem']}")
        if found.get("error"):
            name = "error" if found.get("state") == "FAILED" else "last error"
            lines.append(f"{name:<10}  {found['error']}")
        lines.append(f"folder      {found.get('run_folder')}")
        console = out()
        width = min(console.width, MOST_WIDTH)
        parts: list[RenderableType] = [headline(found), Text(), *stage_lines(progress, width)]
        if found.get("workers") and not progress.ended:
            parts += [Text(), *ring_lines(found, width, MOST_RANKS)]
        console.print(Group(*parts, Text(), Text("\n".join(lines))))


def list_runs(
    states: Annotated[
        list[str] | None,
        typer.Option("--state", metavar="STATE", help="Only runs in this state; repeat for more."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the runs that ended long ago.")
    ] = False,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """List the runs: the newest that have ended, those at work, and the line for workers.

    A run that waits has its place in the line, what it is short of, and when it is likely to start,
    where those ahead of it know how long they will take. JSON has every run, oldest first.
    """
    from ringworld_platform.run_list import chosen_runs, runs_table
    from ringworld_platform.run_view import open_view

    wanted = _states(states or ())
    with open_view(runs, address, store) as opened:
        found = opened.view.list()
    if as_json:
        typer.echo(json.dumps([r for r in found if not wanted or r["state"] in wanted], indent=1))
        return
    _say_where(opened)
    if not found:
        out().print("no runs yet; start one with [cyan]ringworld run JOB.yaml[/cyan]")
        return
    shown, left_out = chosen_runs(found, wanted, everything=everything)
    if left_out:
        note = f"{left_out} runs that ended before these are left out; --all shows them"
        err().print(note, style="dim")
    if not shown:
        err().print(f"none of {len(found)} runs is {' or '.join(sorted(wanted))}", style="dim")
        return
    console = out()
    # What another program reads has a line a run.
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else None
    console.print(runs_table(shown, width), soft_wrap=True)


def report(
    job: NewestRun = None,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
) -> None:
    """Sum up a run, finished or not, and write its report.html with plots."""
    from ringworld_platform.report import build_report, render_terminal, write_report
    from ringworld_platform.run_view import find_status, open_view

    with open_view(runs, address) as opened:
        folder = Path(str(find_status(opened.view, job)["run_folder"]))
    console = out()
    console.print(render_terminal(build_report(folder)))
    console.print(f"\nreport: {write_report(folder)}", markup=False)


def _states(names: Iterable[str]) -> frozenset[str]:
    """The states that are meant, in any case, commas between them or not."""
    from ringworld_platform.run_state import RunState

    asked = [part.strip().upper() for name in names for part in name.split(",") if part.strip()]
    known = list(RunState.__members__)
    for state in asked:
        if state not in known:
            near = difflib.get_close_matches(state, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problem = f"there is no state {state}; there are {', '.join(known)}{hint}"
            raise typer.BadParameter(problem, param_hint="--state")
    return frozenset(asked)


def _say_where(opened: OpenView) -> None:
    if opened.live:
        return
    from ringworld_platform import head

    note = f"no cluster is up; read from the run folders in {opened.where}"
    if (found := head.find_running()) is not None:
        note = f"the cluster at {found.address} has no jobs yet; {opened.where} has"
    elif (lost := head.find_lost()) is not None:
        note = (
            f"the cluster that `ringworld up` started at {lost.address} is gone; `ringworld up` "
            "starts another, which goes on with its unfinished runs, or `ringworld resume RUN` "
            f"does here. This is from the run folders in {opened.where}"
        )
    err().print(note, style="dim", markup=False)
