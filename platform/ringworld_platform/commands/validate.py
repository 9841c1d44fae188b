"""validate: what is wrong with a job spec, and what it comes to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.commands.options import Json
from ringworld_platform.console import out

if TYPE_CHECKING:
    from ringworld_jobs.plan import StagePlan
    from ringworld_jobs.spec import JobSpec


def validate(
    job: Annotated[
        Path, typer.Argument(metavar="FILE.yaml", help="A job spec, data recipe or codebook job.")
    ],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print the spec with every default filled in.")
    ] = False,
    files: Annotated[
        bool, typer.Option(help="Also check that the data which the spec names is there.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Check a job spec, and show what it comes to; nothing is started.

    Every problem is shown at once, with its line, the limit and the remedy. Exit code 2 if any.
    """
    from ringworld_jobs.load import (
        load_codebook,
        load_eval,
        load_generate,
        load_job,
        load_recipe,
    )
    from ringworld_jobs.plan import plan_stages

    kind = _kind(job)
    if kind == "data":
        load_recipe(job, check_files=files)
        out().print(f"{job} is valid; build it with [cyan]ringworld data build {job}[/cyan]")
        return
    if kind == "codebook":
        load_codebook(job, check_files=files)
        command = f"ringworld data train-codebook {job}"
        out().print(f"{job} is valid; train it with [cyan]{command}[/cyan]")
        return
    if kind in ("eval", "generate"):
        load = load_eval if kind == "eval" else load_generate
        asking = load(job, check_files=files)
        if resolved:
            from ringworld_jobs.resolve import resolved_yaml

            typer.echo(resolved_yaml(asking), nl=False)
            return
        out().print(f"{job} is valid; start it with [cyan]ringworld run {job}[/cyan]")
        return
    from ringworld_platform.run_weights import find_run_in_folder

    spec = load_job(job, check_files=files, find_run=find_run_in_folder)
    if resolved:
        from ringworld_jobs.resolve import resolved_yaml

        typer.echo(resolved_yaml(spec), nl=False)
        return
    plans = plan_stages(spec)
    if as_json:
        import json
        from dataclasses import asdict

        stages = [asdict(plan) for plan in plans]
        typer.echo(json.dumps({"job": spec.name, "stages": stages}, indent=1))
        return
    _show_plan(spec, plans)
    out().print(f"\n{job} is valid; start it with [cyan]ringworld run {job}[/cyan]")


def _kind(path: Path) -> str | None:
    """What a file says that it is; None where it cannot be told, and the loader will say why."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return document.get("kind") if isinstance(document, dict) else None


def _show_plan(spec: JobSpec, plans: list[StagePlan]) -> None:
    from rich.table import Table

    from ringworld_jobs.units import format_seconds, format_tokens
    from ringworld_platform.formatting import mesh_heading, mesh_text, quantity

    workers = max(plan.world_size for plan in plans)
    console = out()
    console.print(
        f"[bold]{spec.name}[/bold]  {quantity(plans[0].num_parameters)} parameters, "
        f"{quantity(sum(plan.num_tokens for plan in plans))} tokens, "
        f"{workers} worker{'s' if workers > 1 else ''} of {spec.resources.cpus_per_worker} CPU"
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    mesh = mesh_heading(plan.heads_size for plan in plans)
    shrinks = any(plan.smaller_meshes for plan in plans)
    headings = ["stage", "context", "rope theta", mesh, *["at least"] * shrinks, "per worker"]
    for heading in (*headings, "rows", "steps", "tokens"):
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for plan in plans:
        table.add_row(
            plan.name,
            format_tokens(plan.context_length),
            f"{plan.rope_theta:g}",
            mesh_text(plan.ring_size, plan.heads_size, plan.data_parallel_size),
            *[_smallest(plan)] * shrinks,
            format_tokens(plan.local_length),
            str(plan.rows_per_step),
            str(plan.num_steps),
            quantity(plan.num_tokens),
        )
    console.print(table)
    if shrinks:
        least = spec.resources.workers.min or "one whole ring"
        console.print(
            f"where nodes are lacking for {format_seconds(spec.recovery.shrink_after)}, a stage "
            f"goes on with fewer workers, down to {least} (resources.workers.min)",
            style="dim",
        )


def _smallest(plan: StagePlan) -> str:
    """The least that a stage may run on."""
    from ringworld_platform.formatting import mesh_text

    if not plan.smaller_meshes:
        return mesh_text(plan.ring_size, plan.heads_size, plan.data_parallel_size)
    mesh = plan.smaller_meshes[-1]
    return mesh_text(mesh.ring_size, mesh.heads_size, mesh.data_parallel_size)
