"""data train-codebook: from clips to a small VQGAN of one's own."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringworld_platform.commands.options import Address
from ringworld_platform.console import FAILED, INTERRUPTED, err, out

if TYPE_CHECKING:
    from ringworld_jobs.codebook import CodebookJob
    from ringworld_workers.codebook.update import Update

_EVERY_STEPS = 100
"""Steps between two lines where the output is no terminal."""


def train_codebook(
    job: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The codebook job.")],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the result; default: .ringworld/codebooks/NAME."
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Train a small VQGAN on your own clips, as a visual vocabulary for data recipes.

    Runs on the Ray cluster where one is up (on a GPU if it has one), else in this process. Ctrl-C
    saves and stops; the same command goes on, after a kill too. The folder can be named in a recipe
    as `codebook: {path: DIR}`.
    """
    from ringworld_jobs.load import load_codebook

    spec = load_codebook(job)
    target = (folder or Path(".ringworld/codebooks") / spec.name).absolute()
    from ringworld_workers.data.files import DataError

    try:
        with _updates(spec, job.parent.absolute(), target, address) as updates:
            last = _follow(spec, updates)
    except DataError as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(FAILED) from None
    if last is None or last.result is None:
        err().print(f"stopped and saved; the same command goes on: {target}", markup=False)
        raise typer.Exit(INTERRUPTED)
    _show(target, last.result)


@contextlib.contextmanager
def _updates(
    spec: CodebookJob, base: Path, target: Path, address: str | None
) -> Iterator[Iterator[Update]]:
    """The training's updates, from the cluster or from here; Ctrl-C makes it save and end."""
    from ringworld_platform import cluster, head

    stop = threading.Event()
    with _interrupt_once(stop):
        if address is None and head.find_running() is None:
            from ringworld_workers.codebook.training import train_codebook as train

            yield train(spec, base, target, stop.is_set)
            return
        info = cluster.connect(address)
        err().print(f"using the Ray cluster at {info.address}", style="dim")
        try:
            yield _on_cluster(spec, base, target, stop)
        finally:
            cluster.disconnect()


def _on_cluster(
    spec: CodebookJob, base: Path, target: Path, stop: threading.Event
) -> Iterator[Update]:
    """Run the training as one Ray task, with a GPU where the cluster has one.

    The clips and the folder lie where the cluster's machines see them too.
    """
    import ray

    from ringworld_workers.data.files import DataError

    gpu = spec.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
    task = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_retries=0)(_task)
    # Made here: the task may start only after it has been asked to stop.
    target.mkdir(parents=True, exist_ok=True)
    _stop_file(target).unlink(missing_ok=True)
    updates: Any = task.options(num_returns="streaming").remote(spec, base, target)
    asked = False
    while True:
        if stop.is_set() and not asked:
            asked = True
            _stop_file(target).touch()
        # A short wait, so that Ctrl-C is heard while the task computes.
        ready, _ = ray.wait([updates], timeout=1.0)
        if not ready:
            continue
        try:
            yield ray.get(next(updates))
        except StopIteration:
            return
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DataError):
                raise error.cause from None
            raise


def _task(spec: CodebookJob, base: Path, target: Path) -> Iterator[Update]:
    """What runs on the cluster; the driver asks it to stop through a file, which they share."""
    from ringworld_workers.codebook.training import train_codebook as train

    stop = _stop_file(target)
    try:
        yield from train(spec, base, target, stop.exists)
    finally:
        stop.unlink(missing_ok=True)


def _stop_file(target: Path) -> Path:
    return target / "stop"


@contextlib.contextmanager
def _interrupt_once(stop: threading.Event) -> Iterator[None]:
    """Make the first Ctrl-C or SIGTERM set the event; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, ask) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _follow(spec: CodebookJob, updates: Iterator[Update]) -> Update | None:
    """Show the updates as they come; returns the last one."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = out()
    last: Update | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    shown = -_EVERY_STEPS
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("start", total=1.0, figures="")
        for last in updates:
            figures = _figures(last)
            description = f"{last.phase} {last.step}/{spec.training.steps}"
            progress.update(task, completed=last.share, description=description, figures=figures)
            due = last.phase != "train" or last.step - shown >= _EVERY_STEPS
            if not console.is_terminal and due:
                shown = last.step
                console.print(f"{description}  {figures}".rstrip(), markup=False)
    return last


def _figures(update: Update) -> str:
    parts = []
    if "loss" in update.metrics:
        parts.append(f"loss {update.metrics['loss']:.4f}")
    if "held_out_psnr_db" in update.metrics:
        parts.append(f"held out {update.metrics['held_out_psnr_db']:.2f} dB")
    if update.metrics.get("held_out_codes_used"):
        parts.append(f"{update.metrics['held_out_codes_used']:.0f} codes used")
    return ", ".join(parts)


def _show(target: Path, result: dict[str, Any]) -> None:
    console = out()
    tokenizer, held_out = result["tokenizer"], result["held_out"]
    console.print(
        f"{result['name']}: {held_out['psnr_db']:.2f} dB on {result['held_out_frames']} held-out "
        f"frames, {held_out['codes_used']} of {tokenizer['size']} codes used there, "
        f"{tokenizer['codes_per_frame']} codes a frame",
        markup=False,
    )
    if result["patch_codebook"]:
        patches = result["patch_codebook"]["psnr_db"]
        console.print(f"patches (k-means) of as many codes: {patches:.2f} dB", markup=False)
    for name, reason in result["skipped"].items():
        err().print(f"left out: {name}: {reason}", style="yellow", markup=False)
    console.print(f"in {target}: report.png, result.json, metrics.jsonl", markup=False)
    console.print(f"in a data recipe:  codebook: {{path: {target}}}", markup=False)
