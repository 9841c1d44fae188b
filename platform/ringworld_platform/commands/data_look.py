"""data inspect, data check: what prepared data looks like, and whether it is sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringworld_platform.console import FAILED, err, out

if TYPE_CHECKING:
    from rich.console import Console

    from ringworld_workers.data.decode import Decoder, Sample
    from ringworld_workers.data.shards import Dataset

_BAR = 40

Place = Annotated[
    Path,
    typer.Argument(
        metavar="PREPARED",
        help="Folder of prepared data, of one of its datasets, or the recipe (YAML).",
    ),
]
Cache = Annotated[
    Path, typer.Option("--cache", metavar="DIR", help="Folder of prepared data, for a recipe.")
]


def inspect(
    prepared: Place,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="Only this dataset.")
    ] = None,
    context: Annotated[
        str, typer.Option("--context", metavar="LENGTHS", help="Rows to pack, as 4Ki,32Ki.")
    ] = "4Ki,32Ki",
    rings: Annotated[
        str, typer.Option("--rings", metavar="SIZES", help="Ring sizes to plan, as 2,4,8.")
    ] = "2,4,8",
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=0, help="Examples to decode.")
    ] = 4,
    row: Annotated[
        list[int] | None,
        typer.Option("--row", metavar="N", help="Decode this training example (repeatable)."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the pictures (default: inspect-NAME)."
        ),
    ] = None,
    cache: Cache = Path(".ringworld/data"),
) -> None:
    """Show what a prepared dataset holds: samples as text and frames, lengths, packing.

    Samples are decoded from the tokens that training reads. Text that the model learns to predict
    is [bold]bright[/bold], text that it only reads is [dim]dim[/dim]. A contact sheet with the
    frames and a histogram of the lengths are written as PNG files.

    For each context length it packs the dataset alone and says how much of the rows is padding and
    how evenly a ring's ranks are loaded: the slowest rank's attention over the mean (1.00 is
    ideal). A recipe that is not prepared yet is built first.
    """
    from ringworld_workers.data.decode import Decoder, find_datasets
    from ringworld_workers.data.files import DataError

    lengths = [_context(text) for text in context.split(",") if text.strip()]
    sizes = [_ring_size(text) for text in rings.split(",") if text.strip()]
    console = out()
    try:
        folder, datasets = find_datasets(_prepared(prepared, cache))
        if dataset is not None:
            if dataset not in datasets:
                raise DataError(f"no dataset {dataset!r} here; there are {', '.join(datasets)}")
            datasets = {dataset: datasets[dataset]}
        pictures = target or Path(f"inspect-{folder.name}")
        decoder = Decoder(folder)
        for name, place in datasets.items():
            _inspect(console, name, place, lengths, sizes, samples, row or [], decoder, pictures)
    except (DataError, IndexError) as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(FAILED) from None
    console.print(f"pictures in {pictures}", markup=False)


def check(prepared: Place, cache: Cache = Path(".ringworld/data")) -> None:
    """Check prepared data: every file against its digest, every row against its dataset.

    It compares the digests of shards, length index, tokenizer and codebook, the columns, ids
    against the tokenizer and the codebook, modality and loss flags, the framing of clips (eof after
    each frame, eov after the last), and the totals of meta.json. All that is wrong is listed, with
    file and row, and the exit code is then 1.
    """
    from ringworld_workers.data.check import check_prepared
    from ringworld_workers.data.files import DataError

    console = out()
    try:
        place = _prepared(prepared, cache)
        with console.status("checking") as line:
            findings = check_prepared(place, lambda file: line.update(f"checking {file}"))
    except DataError as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(FAILED) from None
    for finding in findings:
        console.print(finding, style="red", markup=False)
    if findings:
        number = len(findings)
        err().print(f"{number} finding{'s' if number > 1 else ''}; build the data again")
        raise typer.Exit(FAILED)
    console.print(f"sound: {place}", markup=False)


def _prepared(place: Path, cache: Path) -> Path:
    """The prepared folder that a path stands for; a recipe is built where it is not there yet."""
    if place.suffix not in (".yaml", ".yml"):
        return place
    from ringworld_workers.data.prepare import build

    with err().status(f"preparing {place}") as line:
        return build(place, cache, lambda phase, *_: line.update(f"preparing: {phase}")).dir


def _context(text: str) -> int:
    from ringworld_jobs.units import parse_context_length

    try:
        return parse_context_length(text.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}", param_hint="--context") from None


def _ring_size(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no ring size; write 2,4,8", param_hint="--rings")
    return int(text)


def _inspect(
    console: Console,
    name: str,
    place: Path,
    contexts: Sequence[int],
    rings: Sequence[int],
    samples: int,
    chosen: Sequence[int],
    decoder: Decoder,
    pictures: Path,
) -> None:
    import numpy as np

    from ringworld_platform.data_pictures import draw_lengths, draw_sheet
    from ringworld_workers.data.packing_figures import length_bins
    from ringworld_workers.data.shards import SPLITS, Dataset

    splits = {split: Dataset(place, split) for split in SPLITS}
    train = splits["train"]
    _print_head(console, name, splits)
    bins = {str(split): length_bins(dataset.lengths) for split, dataset in splits.items()}
    _print_lengths(console, bins["train"])
    _print_packing(console, train, contexts, rings)
    pictures.mkdir(parents=True, exist_ok=True)
    draw_lengths(f"{name}: lengths", bins, pictures / f"{name}-lengths.png")
    rows = list(chosen)
    if not rows and len(train):
        # Evenly over the dataset: neighbours are often of one file.
        number = min(samples, len(train))
        rows = np.unique(np.linspace(0, len(train) - 1, number).astype(int)).tolist()
    decoded = [decoder.sample(train, index) for index in rows]
    for sample in decoded:
        _print_sample(console, sample)
    if decoded:
        draw_sheet(name, [_strip(sample) for sample in decoded], pictures / f"{name}-samples.png")
    console.print()


def _print_head(console: Console, name: str, splits: dict[Any, Dataset]) -> None:
    from ringworld_platform.formatting import quantity

    meta = splits["train"].meta
    apart = ", rows of its own" if meta["pack_apart"] else ""
    console.print(f"[bold]{name}[/bold]  {meta['kind']}, longer: {meta['longer']}{apart}")
    for split, dataset in splits.items():
        summary = meta["splits"][split]
        lengths = dataset.lengths
        sizes = (
            f"{lengths.min():,} to {lengths.max():,} tokens, median {int(_median(lengths)):,}"
            if len(lengths)
            else ""
        )
        console.print(
            f"  {split:8}  {summary['examples']:>7,} examples  "
            f"{quantity(summary['tokens']):>6} tokens "
            f"({quantity(summary['text_tokens'])} text, {quantity(summary['vision_tokens'])} "
            f"vision)  {sizes}",
            markup=False,
        )
    for reason, number in dict(meta.get("left_out", {})).items():
        if number:
            console.print(f"  left out: {number:,} {reason}", style="yellow", markup=False)
    if meta.get("refused"):
        console.print(f"  refused: {meta['refused']:,} (listed in refused.jsonl)", style="yellow")


def _median(values: Any) -> float:
    import numpy as np

    return float(np.median(values))


def _print_lengths(console: Console, bins: Sequence[tuple[int, int, int]]) -> None:
    from ringworld_jobs.units import format_tokens

    most = max((number for _, _, number in bins), default=0)
    for low, below, number in bins:
        bar = "█" * round(_BAR * number / most) or ("▏" if number else "")
        span = f"{format_tokens(low)} to {format_tokens(below)}"
        console.print(f"  {span:>16}  [cyan]{bar}[/cyan] {number:,}")


def _print_packing(
    console: Console, dataset: Dataset, contexts: Sequence[int], rings: Sequence[int]
) -> None:
    from rich.table import Table

    from ringworld_jobs.units import format_tokens
    from ringworld_workers.data.packing_figures import packing_figures

    table = Table(box=None, pad_edge=True, padding=(0, 2))
    table.add_column("rows of", justify="right")
    for heading in ("padding", "examples a row", *(f"ring of {size}" for size in rings)):
        table.add_column(heading, justify="right")
    notes = []
    for context in contexts:
        found = packing_figures(dataset, context, rings)
        label = format_tokens(context)
        if found.problem:
            notes.append(f"  rows of {label}: {found.problem}")
            continue
        loads = [f"{found.imbalance[size]:.2f}" for size in rings] if found.imbalance else []
        table.add_row(label, f"{found.padding:.2%}", f"{found.examples:.1f}", *loads)
        if found.dropped:
            notes.append(f"  rows of {label}: {found.dropped:,} longer examples are left out")
    if table.row_count:
        console.print(table)
    for note in notes:
        console.print(note, style="yellow", markup=False)


def _print_sample(console: Console, sample: Sample) -> None:
    from rich.text import Text

    from ringworld_workers.data.decode import TextRun

    console.print()
    console.print(_title(sample), style="bold", markup=False)
    line = Text()
    for run in sample.runs:
        if isinstance(run, TextRun):
            line.append(run.text, style="bold" if run.loss else "dim")
        else:
            line.append(f" {_clip(run)} ", style="magenta" if run.loss else "dim magenta")
    console.print(line)


def _title(sample: Sample) -> str:
    return (
        f"row {sample.row}  {sample.name}  {sample.tokens:,} tokens, "
        f"{sample.loss_tokens:,} with loss"
    )


def _clip(run: Any) -> str:
    loss = "" if run.loss else ", no loss"
    note = f"; {run.note}" if run.note else ""
    frames = f"{run.frames} frame{'s' if run.frames != 1 else ''}, " if run.frames else ""
    return f"[{frames}{run.tokens:,} tokens{loss}{note}]"


def _strip(sample: Sample) -> Any:
    from ringworld_platform.data_pictures import Strip
    from ringworld_workers.data.decode import TextRun

    parts: list[Any] = []
    for run in sample.runs:
        parts.append(
            (run.text, run.loss) if isinstance(run, TextRun) else (run.pictures, _clip(run))
        )
    return Strip(_title(sample), tuple(parts))
