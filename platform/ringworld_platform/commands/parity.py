"""parity: prove on a job's own model and rows that the ring computes what one device does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ringworld_platform.commands.options import DEFAULT_RUNS, JobFile, Json, Runs
from ringworld_platform.console import FAILED, err, out
from ringworld_platform.proofs import PARITY_FILE, keep_proof

if TYPE_CHECKING:
    from ringworld_jobs.spec import JobSpec
    from ringworld_workers.parity.case import ParityCase, Precision
    from ringworld_workers.parity.report import ParityReport


def parity(
    job: JobFile,
    ring_sizes: Annotated[
        str,
        typer.Option(
            "--ring-sizes",
            metavar="N,N",
            help="Rings to compare with one rank; 2x4: a ring of 2 places, heads over 4 ranks.",
        ),
    ] = "1,2,4",
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="NAME", help="Whose rows and settings; the last if none."),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Layers of the model.")] = 2,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the batch.")] = 1,
    precision: Annotated[
        Literal["bf16", "fp32", "fp64"], typer.Option("--precision", help="Dtype of the check.")
    ] = "fp32",
    context_length: Annotated[
        str | None,
        typer.Option(
            "--context-length", metavar="TOKENS", help="Longest row; 4Ki unless the stage has less."
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME", help="Keep the result in this run's folder."),
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="Where to, without --run.")
    ] = Path(PARITY_FILE),
    as_json: Json = False,
) -> None:
    """Compare rings with one device: loss, gradient norm and every parameter's gradient.

    Builds the job's own model and data, and takes its real rows: packed as in training, and as one
    document. Each ring is a group of processes on this machine's CPU. Exit code 1 if any difference
    is over the tolerance.
    """
    from ringworld_jobs.load import load_job
    from ringworld_platform.run_weights import find_run

    sizes = _sizes(ring_sizes)
    longest = _tokens(context_length)
    spec = load_job(job, find_run=find_run)
    if stage is not None and stage not in (names := [s.name for s in spec.stages]):
        raise typer.BadParameter(f"{stage!r} is none of {', '.join(names)}", param_hint="--stage")
    folder = None if run is None else _run_folder(runs, run)
    report = _measure(spec, stage, sizes, layers, rows, precision, longest)
    found, path = report.to_json(), output
    if folder is None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    else:
        path = keep_proof(folder, "command", found)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(report)
        out().print(f"written to {path}", markup=False, style="dim")
    if not report.passed:
        raise typer.Exit(FAILED)


def _sizes(text: str) -> list[tuple[int, int]]:
    """Ring and heads sizes: ``1,2,2x4`` gives (1, 1), (2, 1), (2, 4)."""
    found = [re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", part.strip()) for part in text.split(",")]
    sizes = [(int(each[1]), int(each[2] or 1)) for each in found if each]
    if len(sizes) < len(found):
        message = f"{text!r}; write sizes such as 1,2,4 or 2x2"
        raise typer.BadParameter(message, param_hint="--ring-sizes")
    return sizes


def _tokens(text: str | None) -> int | None:
    from ringworld_jobs.units import parse_context_length

    if text is None:
        return None
    try:
        return parse_context_length(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--context-length") from None


def _run_folder(runs: Path, name: str) -> Path:
    from ringworld_platform.run_view import FolderView, find_status

    return Path(str(find_status(FolderView(runs), name)["run_folder"]))


def _measure(
    spec: JobSpec,
    stage: str | None,
    sizes: list[tuple[int, int]],
    layers: int,
    rows: int,
    precision: Precision,
    longest: int | None,
) -> ParityReport:
    from ringworld_platform.errors import PlatformError
    from ringworld_workers.data.files import DataError
    from ringworld_workers.parity.case import build_case
    from ringworld_workers.parity.compare import run_parity
    from ringworld_workers.parity.rows import open_data
    from ringworld_workers.testing import DistributedError

    console = err()
    try:
        with console.status("opening the data") as line:
            data = open_data(spec, lambda phase, done, total: line.update(f"data: {phase}"))
            case = build_case(
                spec,
                data,
                stage_name=stage,
                ring_sizes=sizes,
                num_layers=layers,
                num_rows=rows,
                precision=precision,
                context_length=longest,
            )
            _say(case)
            largest = max(ring * heads for ring, heads in sizes)
            line.update(f"comparing, on {largest} processes")
            return run_parity(case)
    except (DataError, DistributedError) as error:
        raise PlatformError(str(error)) from error


def _say(case: ParityCase) -> None:
    """What is about to be compared, and what is not as the job has it."""
    from ringworld_jobs.units import format_tokens
    from ringworld_platform.formatting import quantity

    documents = "; ".join(str(len(lengths)) for lengths in case.rows["packed"].document_lengths)
    err().print(
        f"{case.job}, stage {case.stage}: {quantity(case.model_config.num_parameters())} "
        f"parameters, {case.model_config.num_layers} layers, {case.precision}; rows of "
        f"{format_tokens(case.context_length)} tokens with {documents} documents",
        markup=False,
    )
    for note in case.notes:
        err().print(f"note: {note}", style="yellow", markup=False)


def _show(report: ParityReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("rows", "ring", "layout", "loss", "norm", "gradient", "worst of", ""):
        table.add_column(
            heading,
            justify="right" if heading in ("ring", "loss", "norm", "gradient") else "left",
            no_wrap=heading != "worst of",
            overflow="fold",
        )
    for ring in report.rings:
        name, error = ring.worst
        halves = "" if ring.precision == report.rings[-1].precision else f" {ring.precision}"
        table.add_row(
            ring.packing + halves,
            ring.shape,
            ring.layout,
            f"{ring.loss_difference:.1e}",
            f"{ring.grad_norm_difference:.1e}",
            f"{error:.1e}" + (f" of {ring.limit(name):.1e}" if ring.one_rank else ""),
            escape(name.removesuffix(".weight")),
            "[green]pass[/]" if ring.passed else "[red]FAIL[/]",
        )
    strictest = min(report.rings, key=lambda ring: ring.loss_limit)
    limits = (strictest.loss_limit, strictest.grad_norm_limit, strictest.limit(strictest.worst[0]))
    table.add_row("", "", "at most", *(f"{limit:.0e}" for limit in limits), "", "", style="dim")
    console = out()
    console.print(table)
    kernels = ", ".join(sorted({ring.backend for ring in report.rings}))
    console.print(f"relative differences from one rank; block kernel: {kernels}", style="dim")
    for ring in report.rings:
        if (
            ring.packing == "packed"
            and ring.shape != "1"
            and ring.precision == report.rings[0].precision
        ):
            console.print(f"ring {ring.shape}: {ring.why}", style="dim", markup=False)
    failed = sum(not ring.passed for ring in report.rings)
    console.print(
        f"[red]{failed} of {len(report.rings)} comparisons are over the tolerance[/]"
        if failed
        else f"[green]every ring gives one device's loss and gradients[/] "
        f"({len(report.rings[0].gradient_errors)} parameters, {report.seconds:.0f} s)"
    )
