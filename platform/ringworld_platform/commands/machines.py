"""up, down, doctor: the machines that jobs run on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ringworld_platform.commands.options import Address, Cpus
from ringworld_platform.console import FAILED, next_commands, out


def up(
    cpus: Cpus = None,
    port: Annotated[int, typer.Option("--port", help="Port of the Ray head.")] = 6379,
    dashboard: Annotated[bool, typer.Option(help="Start Ray's dashboard.")] = True,
    dashboard_port: Annotated[int, typer.Option(help="Port of the dashboard.")] = 8265,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="This machine's address, where other nodes may join.",
        ),
    ] = "127.0.0.1",
) -> None:
    """Start a Ray cluster on this machine that outlives this command, for `ringworld submit`.

    It listens on loopback only; with --host, Ray's ports listen on every interface. Either way it
    asks for the token in ~/.ray/auth_token.

    Runs that an earlier cluster left unfinished go on at once, from their newest checkpoints.
    """
    from ringworld_platform import head
    from ringworld_platform.going_on import go_on

    info = head.up(
        num_cpus=cpus, port=port, dashboard=dashboard, dashboard_port=dashboard_port, host=host
    )
    console = out()
    console.print(f"Ray is up at [bold]{info.address}[/bold]")
    if info.dashboard_url:
        console.print(f"dashboard: {info.dashboard_url}")
        token = head.auth_token()
        if token:
            console.print(f"its token: {token}", markup=False)
    for run_id in go_on():
        console.print(f"{run_id} goes on")
    console.print(
        next_commands(
            [("ringworld submit JOB.yaml", "hand it a job"), ("ringworld down", "stop it")]
        )
    )


def down() -> None:
    """Stop the cluster that `ringworld up` started, and only that; its runs can be resumed."""
    from ringworld_platform import head

    stopped = head.down()
    out().print("Ray is down" if stopped else "no cluster of `ringworld up` is running")


def doctor(
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB.yaml]", help="Also check what this job needs.")
    ] = None,
    address: Address = None,
) -> None:
    """Check this machine: versions, devices, memory, disk, and which kernel each stage would use.

    With a job whose checkpoints go to S3, a small object is written there, read and removed.

    Exit code 1 if something needed is missing, with the remedy.
    """
    from ringworld_platform.doctor import examine, render

    spec = None
    if job is not None:
        from ringworld_jobs.load import load_job
        from ringworld_platform.run_weights import find_run

        spec = load_job(job, find_run=find_run)
    checkup = examine(spec, address)
    out().print(render(checkup))
    if checkup.problems:
        raise typer.Exit(FAILED)
