"""What the commands on checkpoints share: their argument, a bar of bytes, errors as one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringworld_platform.console import FAILED, MISTAKE, err

if TYPE_CHECKING:
    from ringworld_platform.checkpoint_places import Place
    from ringworld_workers.store.base import Store

URI = (
    "A run's name or id, a path, or a url (s3://BUCKET/PREFIX/RUN); /STAGE and /STAGE/STEP "
    "may follow."
)
PlaceText = Annotated[str, typer.Argument(metavar="URI", help=URI)]
NO_ANSWER = 2
"""Exit code of a command that answers with 0 or 1 (verify, diff), where it cannot answer."""


@contextmanager
def plain_errors(failed: int = FAILED) -> Iterator[None]:
    """End the command with one line where a store or a checkpoint refuses.

    Args:
        failed: exit code, where it is not the user's mistake.
    """
    from ringworld_workers.checkpoint.layout import CheckpointError
    from ringworld_workers.checkpoint_tools.choose import NoSuchCheckpoint
    from ringworld_workers.store.base import StoreError

    try:
        yield
    except (CheckpointError, StoreError) as error:
        err().print(f"error: {error}", style="red", markup=False)
        mistake = isinstance(error, NoSuchCheckpoint)
        raise typer.Exit(MISTAKE if mistake else failed) from None


def open_place(text: str, runs: Path) -> tuple[Place, Store]:
    """The place that an argument means, and the store of its checkpoints.

    Raises:
        UnknownRunError: there is no such place.
        StoreError: the store does not answer.
    """
    from ringworld_platform.checkpoint_places import find_place
    from ringworld_workers.store.opening import open_store

    place = find_place(text, runs)
    return place, open_store(place.url)


@contextmanager
def bytes_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere.

    Args:
        text: what is done.
        total: bytes in all.

    Yields:
        A function to be told of more bytes; any thread may call it.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = err()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task(text, total=total)
        yield lambda more: bars.advance(task, more)
