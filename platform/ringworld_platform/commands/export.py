"""export: a checkpoint's weights, for `transformers` and for other jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ringworld_platform.commands.checkpoint_frame import PlaceText, open_place, plain_errors
from ringworld_platform.commands.options import DEFAULT_RUNS, Runs
from ringworld_platform.console import FAILED, err, next_commands, out

if TYPE_CHECKING:
    from ringworld_workers.generation.source import ModelSource


def export(
    uri: PlaceText,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="DIR|URL", help="Folder or s3://BUCKET/PREFIX to write: new, or empty."
        ),
    ],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option("--dtype", help="Dtype of the weights.")
    ] = "fp32",
    max_shard: Annotated[
        str, typer.Option("--max-shard", metavar="BYTES", help="Most bytes of a file of weights.")
    ] = "4Gi",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="PATH",
            help="Text tokenizer to add; that of the run's data if it is on this machine.",
        ),
    ] = None,
    codebook: Annotated[
        Path | None,
        typer.Option(
            "--codebook",
            metavar="PATH",
            help="Codebook to add; that of the run's data if it is on this machine.",
        ),
    ] = None,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Write a checkpoint's master weights in Hugging Face's layout, which transformers loads.

    The newest checkpoint of a run or of a stage, or the one that is named. Vision tables, which a
    Llama has no place for, go to the subfolder ringworld, as the codebook does; a job takes the
    weights back with `init_from: hf:FOLDER`, and `generate` and `chat` take the folder.
    """
    from ringworld_model.hf_config import WeightsError
    from ringworld_platform.formatting import bytes_text
    from ringworld_platform.model_places import find_run_model, resolved_spec
    from ringworld_workers.checkpoint_tools.choose import choose_newest
    from ringworld_workers.data.files import DataError
    from ringworld_workers.export import export_checkpoint
    from ringworld_workers.weights_sink import open_sink

    shard_bytes = _bytes(max_shard)
    console = out()
    try:
        with plain_errors():
            place, store = open_place(uri, runs)
            ref = choose_newest(store, place.stage, place.step)
            spec = resolved_spec(place)
            source = find_run_model(place, tokenizer=tokenizer, codebook=codebook)
            with err().status(f"reading {ref.key}") as line:
                files = export_checkpoint(
                    store,
                    ref,
                    spec,
                    open_sink(to),
                    dtype=dtype,
                    max_shard_bytes=shard_bytes,
                    tokenizer=Path(source.tokenizer) if source.tokenizer else None,
                    codebook=_codebook_of(source),
                    about=source.about,
                    on_tensor=lambda name, done, of: line.update(f"{done}/{of} {name}"),
                )
    except (WeightsError, DataError) as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(FAILED) from None
    size = bytes_text(sum(files.values()))
    console.print(f"{place.run_id} {ref.key}: {size} in {to}", markup=False)
    for file in files:
        console.print(f"  {file}", markup=False, highlight=False)
    if not any("tokenizer" in file for file in files):
        console.print("no tokenizer: the run's data is not at hand; --tokenizer PATH adds one")
    if to.startswith("s3://"):
        console.print("download it for transformers, which reads folders")
        return
    load = f'AutoModelForCausalLM.from_pretrained("{to}")'
    console.print(
        next_commands([(load, "in transformers"), (f"init_from: hf:{to}", "in another job")]),
        markup=False,
    )


def _codebook_of(source: ModelSource) -> Path | None:
    """The codebook at hand, where the model has a table for it."""
    wanted = source.codebook and source.config.vision_codebook_size
    return Path(source.codebook) if wanted else None


def _bytes(text: str) -> int:
    from ringworld_jobs.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--max-shard") from None
