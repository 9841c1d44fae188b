"""plan: what a job takes and costs, before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.commands.options import Address, JobFile, Json
from ringworld_platform.console import FAILED, MISTAKE, err, out

if TYPE_CHECKING:
    from ringworld_jobs.planner.hardware import Hardware
    from ringworld_jobs.spec import JobSpec


def plan(
    job: JobFile,
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", metavar="NxGPU", help="Plan for these, such as 64xH100-80GB."),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Plan for the nodes of the running cluster.")
    ] = False,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Price of one GPU for an hour.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Estimate a job, stage by stage: mesh, memory, time, price, and what does not fit.

    Nothing is started, and data and weights need not be there. Without --gpus and --cluster it is
    planned for this machine, whose CPU is measured for a moment; a job that wants GPUs where there
    are none, for as many H100 as it may take.

    Exit code 1 if a stage does not fit; then the cheapest change of the job that helps is shown.
    """
    from ringworld_jobs.load import load_job

    if gpus is not None and (cluster or address):
        raise typer.BadParameter("give --gpus or --cluster, one of them", param_hint="--gpus")
    spec = load_job(job, check_files=False)
    measured = _hardware(spec, gpus, cluster or address is not None, address)
    from ringworld_jobs.plan import model_config
    from ringworld_jobs.planner.estimate import PlanError, estimate_job
    from ringworld_jobs.planner.levers import find_remedy

    model = model_config(spec)
    hardware = measured()
    try:
        estimate = estimate_job(spec, hardware, model)
    except PlanError as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(MISTAKE) from None
    remedies = {
        stage.index: find_remedy(spec, stage.index, hardware, model)
        for stage in estimate.stages
        if not stage.fits
    }
    if as_json:
        from ringworld_jobs.planner.output import plan_output

        typer.echo(plan_output(spec.name, estimate, remedies, price).model_dump_json(indent=1))
    else:
        from ringworld_platform.plan_display import render

        out().print(render(spec.name, estimate, remedies, price))
    if remedies:
        raise typer.Exit(FAILED)


def _hardware(
    spec: JobSpec, gpus: str | None, cluster: bool, address: str | None
) -> Callable[[], Hardware]:
    """What to plan for; the function waits for what is measured meanwhile."""
    from ringworld_jobs.planner.hardware import HardwareError, parse_gpus
    from ringworld_platform.plan_hardware import cluster_hardware, hardware_of

    if cluster:
        return lambda: cluster_hardware(spec, address)
    if gpus is None:
        return hardware_of(spec)
    try:
        found = parse_gpus(gpus)
    except HardwareError as error:
        raise typer.BadParameter(str(error), param_hint="--gpus") from None
    return lambda: found
