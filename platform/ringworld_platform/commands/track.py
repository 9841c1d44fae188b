"""track: send a run's metric log to MLflow, where that has not everything, or another MLflow."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from ringworld_platform.commands.options import DEFAULT_RUNS, Address, NewestRun, Runs
from ringworld_platform.console import FAILED, err, out

LOOK_SECONDS = 0.1


def track(
    job: NewestRun = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="URI", help="Send it here, such as http://mlflow:5000; else as its job."
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="Send all of it, for a server that has lost some of it."),
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, metavar="SECONDS", help="Longest wait for MLflow.")
    ] = 600.0,
    runs: Runs = DEFAULT_RUNS,
    address: Address = None,
) -> None:
    """Send to MLflow what it lacks of a run: its server was away, or is another one.

    What the server has already stays there once, however often this is done. A run that is at work
    sends by itself.
    """
    from ringworld_jobs.any_job import load_any_job
    from ringworld_jobs.credentials import kind_of_secret
    from ringworld_platform.mlflow_errors import one_line
    from ringworld_platform.run_records import SPEC_FILE
    from ringworld_platform.run_state import TERMINAL
    from ringworld_platform.run_states import RunStates
    from ringworld_platform.run_view import find_status, open_view
    from ringworld_platform.tracking import SENT_BY_ANOTHER, Tracker, tracking_uri

    if to is not None and (kind := kind_of_secret(to)):
        raise typer.BadParameter(
            f"this looks like {kind}; MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, take what a server wants to know",
            param_hint="--to",
        )
    with open_view(runs, address) as opened:
        found = find_status(opened.view, job)
    folder, run_id = Path(str(found["run_folder"])), str(found["run_id"])
    spec = load_any_job(folder / SPEC_FILE, check_files=False)
    uri = to if to is not None else tracking_uri(spec, folder)
    if not uri:
        raise typer.BadParameter(
            f"tracking.mlflow of {run_id} is off; say where to send it", param_hint="--to"
        )
    shown = one_line(uri)
    tracker = Tracker(folder, spec, run_id, uri=uri, anew=again)
    tracker.start()
    ended = found["state"] in TERMINAL
    if ended:
        tracker.end(str(found["state"]))
    deadline, told = time.monotonic() + timeout, None
    while tracker.state != "ended" and (ended or tracker.state != "up to date"):
        if tracker.problem == SENT_BY_ANOTHER and not ended:
            tracker.abandon()
            err().print(f"{run_id} is at work, and sends by itself", style="red", markup=False)
            raise typer.Exit(FAILED)
        if tracker.problem not in (None, told):
            told = tracker.problem
            err().print(f"MLflow at {shown}: {told}; tried again", style="dim", markup=False)
        if time.monotonic() > deadline:
            tracker.abandon()
            why = tracker.problem or "it is still busy"
            err().print(f"MLflow at {shown} has not all of {run_id}: {why}", style="red")
            raise typer.Exit(FAILED)
        threading.Event().wait(LOOK_SECONDS)
    tracker.abandon()
    if tracker.problem:
        err().print(f"MLflow refused: {tracker.problem}", style="yellow", markup=False)
    elif ended and to is None and found.get("tracking_problem"):
        # Nobody else is at the run any more.
        RunStates(folder.parent).update(
            run_id, lambda record: record.model_copy(update={"tracking_problem": None})
        )
    if tracker.dropped:
        err().print(f"{tracker.dropped} points were refused or cannot be read", style="yellow")
    out().print(f"MLflow at {shown} has all of {run_id}", markup=False)
