"""data build: from a recipe to datasets that a job trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ringworld_platform.console import FAILED, err, out


def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The data recipe.")],
    cache: Annotated[
        Path, typer.Option("--cache", metavar="DIR", help="Folder of prepared data.")
    ] = Path(".ringworld/data"),
) -> None:
    """Prepare a data recipe: tokenizer, video codes, shards. Done once; later calls find it.

    `ringworld run` does this by itself when a job's data is not there yet.
    """
    from ringworld_jobs.load import load_recipe

    load_recipe(recipe)
    from ringworld_workers.data.files import DataError
    from ringworld_workers.data.prepare import build as prepare

    console = out()
    try:
        with console.status("starting") as line:
            seen = ""

            def show(phase: str, done: int, total: int) -> None:
                nonlocal seen
                line.update(f"{phase} {done}/{total}" if total else f"{phase} {done}")
                if phase != seen and not console.is_terminal:
                    console.print(phase, markup=False)
                seen = phase

            prepared = prepare(recipe, cache, show)
    except DataError as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(FAILED) from None
    for skipped in prepared.skipped:
        err().print(f"left out: {skipped}", style="yellow", markup=False)
    found = "was there already" if prepared.cached else "built"
    console.print(f"{found}: {prepared.dir}", markup=False)
    for name, folder in prepared.datasets.items():
        console.print(f"  {name}  {folder}", markup=False)
    console.print(
        f"tokenizer {prepared.tokenizer_size} pieces, codebook {prepared.codebook_size} codes"
    )
