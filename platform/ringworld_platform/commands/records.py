"""events, logs: what a run has told, line by line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ringworld_platform.commands.options import (
    DEFAULT_RUNS,
    Address,
    JsonLines,
    NewestRun,
    RunName,
    Runs,
    StoreUrl,
)
from ringworld_platform.console import err, out

if TYPE_CHECKING:
    from ringworld_platform.log_records import LogReader
    from ringworld_platform.run_records import Record
    from ringworld_platform.run_view import OpenView

T = TypeVar("T")
Follow = Annotated[
    bool,
    typer.Option(
        "-f", "--follow", help="Go on until the run ends, or is abandoned; Ctrl-C leaves."
    ),
]
Stage = Annotated[str | None, typer.Option("--stage", metavar="STAGE", help="Only of this stage.")]


def events(
    job: NewestRun = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="KIND", help="Only of this kind; repeat for more."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Only from 10min or 2h ago, or 14:30, on."),
    ] = None,
    stage: Stage = None,
    follow: Follow = False,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
    store: StoreUrl = None,
    as_json: JsonLines = False,
) -> None:
    """Print a run's events: what began, was saved, failed, went slow, and was decided.

    Kinds are state, stage, checkpoint, plan, parity, failure, slow, drain, loss_spike, rollback,
    prewarm and more; with --json each event is one line, with all its fields.
    """
    from ringworld_platform.event_lines import (
        EventTable,
        WantedEvents,
        kinds_named,
        nothing_found,
        since_when,
    )
    from ringworld_platform.run_view import open_view

    moment = 0.0 if since is None else _given(lambda: since_when(since), "--since")
    wanted = WantedEvents(kinds_named(kinds or ()), moment, stage)
    name, store = _split(job, store)
    with open_view(runs, address, store) as opened:
        run_id = _find(opened, name)
        seen: list[Record] = []
        last, begun = 0, False
        console = out()
        table = EventTable(console.width if console.is_terminal else None)
        for _ in _looks(opened, run_id, follow):
            new = opened.view.events(run_id, after=last)
            seen += new
            last = max([last, *(int(event.get("seq", 0)) for event in new)])
            shown = [event for event in new if event in wanted]
            for event in shown if as_json else ():
                typer.echo(json.dumps(event))
            if shown and not as_json:
                if not begun:
                    console.print(table.heading(shown), soft_wrap=True)
                for event in shown:
                    console.print(table.row(event), soft_wrap=True)
            begun = begun or bool(shown)
        if not begun:
            err().print(f"{run_id}: {nothing_found(seen, wanted)}", style="dim", markup=False)


def logs(
    job: RunName,
    ranks: Annotated[
        list[str] | None,
        typer.Option("--rank", metavar="RANKS", help="Only of 3, or 0,2, or 4-7; all if left out."),
    ] = None,
    level: Annotated[
        str, typer.Option("--level", metavar="LEVEL", help="Only of this level and above.")
    ] = "debug",
    stage: Stage = None,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, help="Only of this attempt.")
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option("--grep", metavar="PATTERN", help="Only where this is found; see below."),
    ] = None,
    tail: Annotated[
        int | None, typer.Option("--tail", min=0, metavar="N", help="Only the last N such lines.")
    ] = None,
    follow: Follow = False,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
    store: StoreUrl = None,
    as_json: JsonLines = False,
) -> None:
    """Print what the workers of a run have logged, in order over the ranks.

    A line has the time, the level, the rank, the stage and its step, and the message; with --json
    it is an object with all of these, the node, the attempt and the traceback. PATTERN is a regular
    expression; in lower case it finds any case. Of a failed run, why it failed comes last.
    """
    from ringworld_platform.log_lines import LogLines
    from ringworld_platform.log_records import (
        LogReader,
        Wanted,
        level_named,
        ranks_named,
        smart_pattern,
    )
    from ringworld_platform.run_view import open_view

    wanted = Wanted(
        _given(lambda: ranks_named(ranks or ()), "--rank"),
        _given(lambda: level_named(level), "--level"),
        stage,
        attempt,
        None if grep is None else _given(lambda: smart_pattern(grep), "--grep"),
    )
    name, store = _split(job, store)
    with open_view(runs, address, store) as opened:
        run_id = _find(opened, name)
        reader = LogReader(opened.view, run_id, wanted)
        console = out()
        lines = LogLines(colour=console.is_terminal and not console.no_color)
        printed = 0
        for look in _looks(opened, run_id, follow):
            new: Iterable[Record] = reader.new()
            if look == 0:
                lines.widen(opened.view.log_ends(run_id))
                new = new if tail is None else reader.tail(tail)
            for record in new:
                typer.echo(json.dumps(record) if as_json else lines.line(record))
                printed += 1
        if not printed:
            err().print(_nothing_logged(opened, run_id, reader), style="dim", markup=False)
        last = opened.view.status(run_id)
        if last["state"] == "FAILED":
            err().print(f"{run_id} failed: {last.get('error')}", style="red", markup=False)


def _nothing_logged(opened: OpenView, run_id: str, reader: LogReader) -> str:
    there = sorted(opened.view.log_ends(run_id))
    if not there:
        return f"{run_id} has logged nothing yet"
    if not reader.ranks():
        return (
            f"{run_id} has no log of such a rank; it has those of ranks {there[0]} to {there[-1]}"
        )
    return f"none of {reader.read} lines of {run_id} matches"


def _looks(opened: OpenView, run_id: str, follow: bool) -> Iterable[int]:
    """Once a look at the run; the last one after it has ended, or nobody goes on with it."""
    from ringworld_platform.left_alone import LeftAlone, farewell
    from ringworld_platform.run_state import TERMINAL

    look, alone = 0, LeftAlone()
    while True:
        status = opened.view.status(run_id)
        ended, left = status["state"] in TERMINAL, alone.seen(status)
        yield look
        if ended or not follow:
            return
        if left:
            err().print(farewell(status), style="yellow", markup=False)
            return
        look += 1
        time.sleep(opened.poll_seconds)


def _find(opened: OpenView, name: str | None) -> str:
    from ringworld_platform.run_view import find_status

    return str(find_status(opened.view, name)["run_id"])


def _split(job: str | None, store: str | None) -> tuple[str | None, str | None]:
    from ringworld_platform.store_view import split_url

    return split_url(job, store)


def _given(read: Callable[[], T], option: str) -> T:
    """An option's value, or what is wrong with it.

    Raises:
        typer.BadParameter: it cannot be read.
    """
    try:
        return read()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
