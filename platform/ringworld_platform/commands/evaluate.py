"""evaluate: ask things of a model that is there already."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringworld_platform.commands.options import DEFAULT_RUNS, Address, Cpus

if TYPE_CHECKING:
    from ringworld_jobs.any_job import Job


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="RUN, RUN/STAGE or RUN/STAGE/STEP, s3://BUCKET/PREFIX/RUN, a folder of weights; "
            "or an evaluation job, FILE.yaml.",
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="What to ask: needle, ...; repeat for more."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", metavar="DIR", help="A prepared dataset, for tasks on held-out data."
        ),
    ] = None,
    context_length: Annotated[
        str | None,
        typer.Option("--context", metavar="TOKENS", help="Longest row; the model's own if not."),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Most workers: rings that share the items.")
    ] = 1,
    runs: Annotated[
        Path, typer.Option("--runs", metavar="DIR", help="Folder of runs: the model's and this.")
    ] = DEFAULT_RUNS,
    cpus: Cpus = None,
    address: Address = None,
) -> None:
    """Evaluate a model in the foreground, and show what was found.

    It is a run like any other: `ringworld status`, `stop`, `resume` and `report` know it. All
    settings of a task, and limits that it must keep, are in a file of `kind: eval`.
    """
    from ringworld_platform.commands.train import run_spec

    job = _job(model, tasks or [], data or [], context_length, workers, runs)
    run_spec(job, cpus, False, address)


def _job(
    model: str,
    tasks: list[str],
    data: list[Path],
    context_length: str | None,
    workers: int,
    runs: Path,
) -> Job:
    """The job that the arguments mean.

    Raises:
        JobSpecError: everything that is wrong with it.
        typer.BadParameter: neither a job nor tasks are given, or both.
    """
    from ringworld_jobs.any_job import load_any_job
    from ringworld_jobs.load import eval_of

    if model.endswith((".yaml", ".yml")):
        if tasks or data:
            raise typer.BadParameter("a job file says itself what is asked: leave out the options")
        return load_any_job(model)
    if not tasks:
        raise typer.BadParameter("say what to ask, such as --task needle", param_hint="--task")
    name = re.sub(r"[^a-z0-9._-]+", "-", model.rstrip("/").lower()).strip("-._")
    values: dict[str, Any] = {
        "kind": "eval",
        "name": f"evaluate-{name}"[-63:].lstrip("-._"),
        "model": model,
        "evaluate": tasks,
        "resources": {"workers": {"max": workers}},
        "checkpoint": {"store": f"file://{runs}"},
        "data": {"sources": {folder.name: {"shards": str(folder)} for folder in data}},
    }
    if context_length is not None:
        values["context_length"] = context_length
    return eval_of(values, "the command line")
