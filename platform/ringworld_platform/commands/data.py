"""data build: from a recipe to datasets that a job trains on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.commands.options import Address, Cpus
from ringworld_platform.console import FAILED, INTERRUPTED, err, out

if TYPE_CHECKING:
    from ringworld_workers.data.prepare import Prepared
    from ringworld_workers.data.work import Mapper

SHOWN_REFUSALS = 10


def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The data recipe.")],
    cache: Annotated[
        Path, typer.Option("--cache", metavar="DIR", help="Folder of prepared data.")
    ] = Path(".ringworld/data"),
    address: Address = None,
    cpus: Cpus = None,
) -> None:
    """Prepare a data recipe: tokenizer, video codes, shards. Done once; later calls find it.

    Much work goes to a Ray cluster: the one of --address or of `ringworld up`, else one that is
    started here for as long as it takes. A build that is stopped, or killed, goes on where it was
    when it is called again. `ringworld run` does all this by itself when a job's data is not there.
    """
    from ringworld_jobs.load import load_recipe

    load_recipe(recipe)
    from ringworld_platform.build_display import build_display
    from ringworld_workers.data.files import DataError
    from ringworld_workers.data.prepare import build as prepare

    console = out()
    try:
        # The cluster ends before the display does, so that its messages stand above the bars.
        with build_display(console) as show, ExitStack() as stack:
            cluster = _cluster(stack, address, cpus)
            prepared = prepare(recipe, cache, show, cluster)
    except DataError as error:
        err().print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        err().print(
            f"stopped; what is done is kept in {cache}, and the same command goes on from there",
            style="yellow",
            markup=False,
        )
        raise typer.Exit(INTERRUPTED) from None
    _show(prepared)


def _cluster(stack: ExitStack, address: str | None, cpus: int | None) -> Callable[[], Mapper]:
    """What connects to a cluster or starts one, and lets go of it when the stack ends."""

    def find() -> Mapper:
        from ringworld_platform import cluster, head
        from ringworld_workers.data.ray_items import RayMapper

        if address is not None or head.find_running() is not None:
            info = cluster.connect(address)
            stack.callback(cluster.disconnect)
            err().print(f"using the Ray cluster at {info.address}", style="dim")
        else:
            err().print("starting Ray on this machine", style="dim")
            stack.enter_context(cluster.local_cluster(num_cpus=cpus))
        return RayMapper()

    return find


def _show(prepared: Prepared) -> None:
    console = out()
    found = "was there already" if prepared.cached else "built"
    console.print(f"{found}: {prepared.dir}", markup=False)
    for name, folder in prepared.datasets.items():
        console.print(f"  {name}  {folder}", markup=False)
    console.print(
        f"tokenizer {prepared.tokenizer_size} pieces, codebook {prepared.codebook_size} codes"
    )
    for name, count in prepared.refused.items():
        if not count:
            continue
        err().print(
            f"{name}: {count} could not be used, listed in {prepared.refused_file(name)}",
            style="yellow",
            markup=False,
        )
        for entry, reason in prepared.refusals(name, SHOWN_REFUSALS):
            err().print(f"  {entry}: {reason}", markup=False)
        if count > SHOWN_REFUSALS:
            err().print(f"  and {count - SHOWN_REFUSALS} more")
