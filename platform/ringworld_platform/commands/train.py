"""run, submit, stop, resume: from a job spec to a trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.commands.options import (
    DEFAULT_RUNS,
    Address,
    Cpus,
    JobFile,
    RunName,
    Runs,
)
from ringworld_platform.console import FAILED, INTERRUPTED, err, next_commands, out

if TYPE_CHECKING:
    from ringworld_jobs.any_job import Job
    from ringworld_platform.client import Client
    from ringworld_platform.run_records import Record

Dashboard = Annotated[
    bool, typer.Option("--dashboard", help="Also start Ray's dashboard (200 MB of memory).")
]


def run(
    job: JobFile, cpus: Cpus = None, dashboard: Dashboard = False, address: Address = None
) -> None:
    """Run a job in the foreground, and show its progress and its report.

    Starts Ray on this machine if no cluster is up, and leaves no process behind. Ctrl-C stops at a
    checkpoint and says how to go on; a second Ctrl-C ends at once.
    """
    from ringworld_jobs.any_job import load_any_job
    from ringworld_platform.run_weights import find_run

    run_spec(load_any_job(job, find_run=find_run), cpus, dashboard, address)


def run_spec(spec: Job, cpus: int | None, dashboard: bool, address: str | None) -> None:
    """Run a job that is loaded already; see ``run``."""
    from ringworld_platform import cluster, head
    from ringworld_platform.client import Client, runs_root_of
    from ringworld_platform.run_claims import check_store, on_s3

    if address is not None or head.find_running() is not None:
        info = cluster.connect(address, ship=True, name=f"run {spec.name}")
        err().print(f"using the Ray cluster at {info.address}", style="dim")
        client = Client.attach(runs_root_of(spec))
        _foreground(client, _submit(client, spec))
        return
    if on_s3(spec):
        check_store(spec)  # before Ray takes its time to start: the workers run right here
    err().print("starting Ray on this machine", style="dim")
    _one_shot(runs_root_of(spec), lambda client: client.submit(spec), cpus, dashboard)


def _one_shot(
    root: Path, begin: Callable[[Client], str], cpus: int | None, dashboard: bool
) -> None:
    """Begin a run on a cluster of this command's own, and stay with it to its end."""
    from ringworld_platform import cluster
    from ringworld_platform.client import Client
    from ringworld_platform.settling import settle

    run_id = ""
    try:
        with cluster.local_cluster(num_cpus=cpus, dashboard=dashboard) as info:
            _say_dashboard(info.dashboard_url)
            client = Client.attach(root, one_shot=True)
            run_id = begin(client)
            status = _foreground(client, run_id, raise_exit=False)
    except KeyboardInterrupt:
        if run_id:
            settle(root, run_id)
        raise
    _exit(status)


def resume(
    job: RunName,
    runs: Runs = DEFAULT_RUNS,
    cpus: Cpus = None,
    dashboard: Dashboard = False,
    address: Address = None,
    older: Annotated[
        bool,
        typer.Option(
            "--older",
            help="Where the newest checkpoint is damaged, set it aside and take an older one.",
        ),
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="URL", help="The run is in this store on S3, and may not be here."
        ),
    ] = None,
) -> None:
    """Continue a stopped or failed run from its last committed checkpoint.

    Where a cluster is up, the run continues there, in the background; else here, in the foreground.

    A run on S3 whose folder was on another machine is named by its url, s3://BUCKET/PREFIX/RUN: its
    folder is made here from its store.

    Which checkpoints a run has, and whether they are sound, `ringworld checkpoints` tells.
    """
    from ringworld_platform import cluster, head
    from ringworld_platform.client import Client
    from ringworld_platform.run_claims import check_store, on_s3, spec_kept_in
    from ringworld_platform.run_view import FolderView, find_status

    url = _run_url(job, store)
    if address is not None or head.find_running() is not None:
        cluster.connect(address, ship=True, name=f"resume {job}")
        client = Client.attach(runs.absolute())
        run_id = client.resume(url or _known(client, runs, job), older=older)
        out().print(f"{run_id} continues", style="bold")
        out().print(_follow_up(run_id))
        return
    name = url
    if name is None:
        found = find_status(FolderView(runs), job)
        name, spec = str(found["run_id"]), spec_kept_in(Path(found["run_folder"]))
        if spec is not None and on_s3(spec):
            check_store(spec)  # before Ray takes its time to start, as `run` does
    err().print(f"starting Ray on this machine to continue {name}", style="dim")
    _one_shot(runs.absolute(), lambda client: client.resume(name, older=older), cpus, dashboard)


def _run_url(job: str, store: str | None) -> str | None:
    """Url of a run that is looked up in its store; None where it is not."""
    from ringworld_platform.run_view import open_view
    from ringworld_platform.store_view import StoreView, split_url

    name, place = split_url(job, store)
    if place is None or name is None:
        return None
    with open_view(DEFAULT_RUNS, store=place) as opened:
        view = opened.view
        return view.run_url(name) if isinstance(view, StoreView) else None


def _known(client: Client, runs: Path, job: str) -> str:
    """Id of a run that the cluster knows of, or that is in a folder which it has yet to hear of."""
    from ringworld_platform.errors import UnknownRunError
    from ringworld_platform.run_view import FolderView, find_status

    try:
        return str(find_status(client, job)["run_id"])
    except UnknownRunError:
        return str(find_status(FolderView(runs), job)["run_id"])


def submit(job: JobFile, address: Address = None) -> None:
    """Hand a job to a cluster and return at once.

    The cluster is the one of `ringworld up`, or --address: of a head, on a machine of the cluster;
    or of its dashboard, http://HOST:PORT, from anywhere. Our own packages go along.

    Submitting a job twice that is still active gives the same run.
    """
    from ringworld_jobs.any_job import load_any_job
    from ringworld_platform import cluster
    from ringworld_platform.client import Client, runs_root_of
    from ringworld_platform.remote_submit import is_dashboard
    from ringworld_platform.remote_submit import submit as submit_there
    from ringworld_platform.run_weights import find_run

    if address is not None and is_dashboard(address):
        spec = load_any_job(job, check_files=False)
        say = lambda text: out().print(text, markup=False)  # noqa: E731
        raise typer.Exit(submit_there(spec, job, address, say))
    loaded = load_any_job(job, find_run=find_run)
    info = cluster.connect(address, ship=True, name=f"submit {loaded.name}")
    client = Client.attach(runs_root_of(loaded))
    run_id = _submit(client, loaded)
    console = out()
    console.print(f"[bold]{run_id}[/bold] submitted to {info.address}")
    console.print(_follow_up(run_id))


def _submit(client: Client, spec: Job) -> str:
    """Hand a job to a cluster that runs already."""
    from ringworld_platform.errors import StoreRefused
    from ringworld_platform.run_claims import on_s3

    try:
        return client.submit(spec)
    except StoreRefused as error:
        if not on_s3(spec):
            raise
        raise StoreRefused(
            f"{error}; it was the cluster that tried: its processes have the environment of "
            "`ringworld up`, not that of this command"
        ) from None


def stop(job: RunName, address: Address = None) -> None:
    """Ask a run to stop: it finishes its step, saves a checkpoint, and can be resumed."""
    from ringworld_platform import cluster
    from ringworld_platform.client import Client
    from ringworld_platform.run_view import find_status

    cluster.connect(address)
    client = Client.attach(create=False)
    run_id = client.stop(str(find_status(client, job)["run_id"]))
    console = out()
    console.print(f"[bold]{run_id}[/bold] stops after its current step and checkpoint")
    console.print(
        next_commands(
            [
                (f"ringworld status {run_id}", "has it stopped?"),
                (f"ringworld resume {run_id}", "go on from the checkpoint"),
            ]
        )
    )


def _follow_up(run_id: str) -> str:
    return next_commands(
        [
            (f"ringworld watch {run_id}", "live view"),
            (f"ringworld logs -f {run_id}", "what the workers print"),
            (f"ringworld stop {run_id}", "stop at a checkpoint"),
        ]
    )


def _say_dashboard(url: str | None) -> None:
    if url is not None:
        err().print(f"Ray dashboard: {url}", style="dim")


def _foreground(client: Client, run_id: str, *, raise_exit: bool = True) -> Record:
    """Follow a run to its end and show its report."""
    from ringworld_platform.display import open_display
    from ringworld_platform.follow import follow

    console = out()
    console.print(f"run [bold]{run_id}[/bold]")
    display = open_display(console)
    try:
        status = follow(client, run_id, display)
    except KeyboardInterrupt:
        display.close()
        err().print(f"ended; go on with [cyan]ringworld resume {run_id}[/cyan]")
        raise
    finally:
        display.close()
    if raise_exit:
        _exit(status)
    return status


def _exit(status: Record) -> None:
    """Show the report and what to do next, and end with the job's exit code."""
    from ringworld_platform.run_state import RunState

    run_id, folder = str(status["run_id"]), Path(str(status["run_folder"]))
    console = out()
    if folder.is_dir():
        from ringworld_platform.report import build_report, render_terminal, write_report

        console.print()
        console.print(render_terminal(build_report(folder)))
        try:
            console.print(f"\nreport: {write_report(folder)}", markup=False)
        except OSError as error:
            # The disk may be what has ended the run: that must still be said below.
            err().print(f"no report.html: {error.strerror or error}", style="red", markup=False)
    state = status["state"]
    if state == RunState.SUCCEEDED:
        return
    if state == RunState.STOPPED:
        console.print(f"stopped; go on with [cyan]ringworld resume {run_id}[/cyan]")
        raise typer.Exit(INTERRUPTED)
    older = "--older" in str(status.get("error"))  # the refusal of a damaged checkpoint offers it
    again = (
        (f"ringworld resume {run_id} --older", "go on from the checkpoint before the damaged one")
        if older
        else (f"ringworld resume {run_id}", "try again from the last checkpoint")
    )
    err().print(
        next_commands([(f"ringworld logs {run_id}", "what the workers printed"), again]),
        markup=False,
    )
    # Last, where one looks first.
    err().print(f"{run_id} failed: {status.get('error')}", style="red", markup=False)
    raise typer.Exit(FAILED)
