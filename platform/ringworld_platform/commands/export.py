"""export: a checkpoint's weights, for `transformers` and for other jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ringworld_platform.commands.options import DEFAULT_RUNS, Runs
from ringworld_platform.console import FAILED, err, next_commands, out
from ringworld_platform.errors import PlatformError, UnknownRunError

if TYPE_CHECKING:
    from ringworld_workers.checkpoint.layout import CheckpointRef
    from ringworld_workers.store.base import Store


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT", help="A job's name, a run's id, or a checkpoint's folder."
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to write: new, or empty.")
    ],
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="The last one if left out.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="The stage's last if left out.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option("--dtype", help="Dtype of the weights.")
    ] = "fp32",
    max_shard: Annotated[
        str, typer.Option("--max-shard", metavar="BYTES", help="Most bytes of a file of weights.")
    ] = "4Gi",
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Write a checkpoint's master weights in Hugging Face's layout, which transformers loads.

    Vision tables, which a Llama has no place for, go to the subfolder ringworld; a job takes all of
    it back with `init_from: hf:FOLDER`.
    """
    from ringworld_jobs.load import load_job
    from ringworld_model.hf_config import WeightsError
    from ringworld_platform.run_records import SPEC_FILE, read_state
    from ringworld_workers.checkpoint.layout import CheckpointError
    from ringworld_workers.data.files import DataError
    from ringworld_workers.export import export_checkpoint
    from ringworld_workers.store.base import StoreError

    shard_bytes = _bytes(max_shard)
    console = out()
    try:
        run_folder, store, ref = _find(source, stage, step, runs)
        spec = load_job(run_folder / SPEC_FILE, check_files=False)
        prepared = (read_state(run_folder).get("prepared") or {}).get("dir")
        tokenizer = Path(prepared) if prepared and Path(prepared).is_dir() else None
        with console.status(f"reading {ref.key}") as line:
            files = export_checkpoint(
                store,
                ref,
                spec,
                folder,
                dtype=dtype,
                max_shard_bytes=shard_bytes,
                tokenizer=tokenizer,
                on_tensor=lambda name, done, of: line.update(f"{done}/{of} {name}"),
            )
    except (CheckpointError, StoreError, WeightsError, DataError) as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(FAILED) from None
    size = sum(file.stat().st_size for file in files)
    console.print(f"{run_folder.name} {ref.key}: {size / 1e6:.1f} MB in {folder}", markup=False)
    for file in files:
        console.print(f"  {file.relative_to(folder)}", markup=False, highlight=False)
    load = f'AutoModelForCausalLM.from_pretrained("{folder}")'
    console.print(
        next_commands([(load, "in transformers"), (f"init_from: hf:{folder}", "in another job")]),
        markup=False,
    )


def _find(
    source: str, stage: str | None, step: int | None, runs: Path
) -> tuple[Path, Store, CheckpointRef]:
    """The run's folder, its store of checkpoints, and the checkpoint that is meant."""
    from ringworld_platform.run_folder import CHECKPOINTS_FOLDER
    from ringworld_platform.run_view import FolderView, find_status
    from ringworld_workers.checkpoint.catalog import committed
    from ringworld_workers.checkpoint.layout import MANIFEST
    from ringworld_workers.export import choose_checkpoint
    from ringworld_workers.store.opening import open_store

    given = Path(source)
    if not given.is_dir():
        found = Path(str(find_status(FolderView(runs), source)["run_folder"]))
        store = open_store(f"file://{found.absolute()}/{CHECKPOINTS_FOLDER}")
        return found, store, choose_checkpoint(store, stage, step)
    if not (given / MANIFEST).is_file():
        raise UnknownRunError(
            f"{given} is no committed checkpoint (no {MANIFEST} in it); give a run's name, or a "
            f"folder such as RUN/{CHECKPOINTS_FOLDER}/00-STAGE/step-00000100"
        )
    if stage is not None or step is not None:
        raise PlatformError("a checkpoint's folder has its stage and step; leave the options out")
    root = given.resolve().parents[1]
    store = open_store(f"file://{root}")
    key = given.resolve().relative_to(root).as_posix()
    for ref in committed(store):
        if ref.key == key:
            return root.parent, store, ref
    raise UnknownRunError(f"{given} is no checkpoint of a run's store {root}")


def _bytes(text: str) -> int:
    from ringworld_jobs.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--max-shard") from None
