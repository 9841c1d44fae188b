"""deploy: the files that bring ringworld to AWS and Kubernetes, filled in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ringworld_platform.console import MISTAKE, err, out
from ringworld_platform.deploy_files import (
    TARGETS,
    DeployError,
    Values,
    next_commands,
    render,
    write,
)
from ringworld_platform.head import find_running, token_file

_DEFAULT = Values()


def deploy(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="What to write; see --list.")
    ] = None,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Folder to write them into.")
    ] = Path("deploy"),
    show: Annotated[bool, typer.Option("--list", help="Show what there is, and stop.")] = False,
    name: Annotated[
        str, typer.Option("--name", help="Of the cluster and all that belongs to it.")
    ] = _DEFAULT.name,
    region: Annotated[str, typer.Option("--region", help="Of AWS.")] = _DEFAULT.region,
    bucket: Annotated[
        str, typer.Option("--bucket", metavar="NAME", help="For checkpoints.")
    ] = _DEFAULT.bucket,
    prefix: Annotated[
        str, typer.Option("--prefix", help="In the bucket; rights go no further.")
    ] = _DEFAULT.prefix,
    instance_type: Annotated[
        str, typer.Option("--instance-type", metavar="TYPE", help="Of the workers.")
    ] = _DEFAULT.instance_type,
    max_workers: Annotated[
        int, typer.Option("--max-workers", metavar="N", help="Worker machines, at most.")
    ] = _DEFAULT.max_workers,
    image: Annotated[
        str, typer.Option("--image", help="Container image, such as REGISTRY/ringworld:1.")
    ] = _DEFAULT.image,
    ami: Annotated[
        str,
        typer.Option(
            "--ami", help="Machine image; AWS's newest for GPUs if left out.", show_default=False
        ),
    ] = _DEFAULT.ami,
    subnet: Annotated[
        str, typer.Option("--subnet", metavar="ID", help="Of the head.")
    ] = _DEFAULT.subnet,
    worker_subnet: Annotated[
        str, typer.Option("--worker-subnet", metavar="ID", help="Of the workers, if another.")
    ] = _DEFAULT.worker_subnet,
    security_group: Annotated[
        str, typer.Option("--security-group", metavar="ID", help="Of all machines.")
    ] = _DEFAULT.security_group,
    dashboard: Annotated[
        str | None,
        typer.Option(
            "--dashboard",
            metavar="URL",
            help="Ray's, for Prometheus to ask; that of `ringworld up` if left out.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that are there already.")
    ] = False,
) -> None:
    """Write the files that a cluster is made of, or is watched with, with your names in them.

    Nothing is contacted and nothing started: each file says in its head what to do with it, and
    docs/deploy.md goes the whole way.
    """
    if show or target is None:
        for key, known in TARGETS.items():
            out().print(f"[bold]{key:<13}[/bold]  {known.summary}")
            # Of a folder its name is enough.
            files = dict.fromkeys(re.sub("/.*", "/", file) for file in known.files)
            out().print(f"{'':<13}  {', '.join(files)}", style="dim")
        return
    running = find_running()
    found = running.dashboard_url if running else None
    token = token_file()
    values = Values(
        folder=str(to.absolute()),
        dashboard=dashboard or found or _DEFAULT.dashboard,
        token_file=str(token) if token else "",
        name=name,
        region=region,
        bucket=bucket,
        prefix=prefix,
        instance_type=instance_type,
        max_workers=max_workers,
        image=image,
        ami=ami,
        subnet=subnet,
        worker_subnet=worker_subnet,
        security_group=security_group,
    )
    try:
        paths = write(render(target, values), to, force=force)
    except DeployError as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(MISTAKE) from None
    for path in paths:
        out().print(str(path), markup=False)
    for command in next_commands(target, values):
        out().print(command, markup=False, soft_wrap=True)
