"""Where files of weights go: a folder that gets its name last, or whatever else is a ``Sink``."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from ringworld_model.hf_config import WeightsError

Chunk = bytes | memoryview


class Sink(Protocol):
    """Takes files, one after the other. ``open`` is called first, ``commit`` or ``abort`` last."""

    def open(self, needed_bytes: int) -> None:
        """Refuse a place that holds anything, or lacks the room.

        Raises:
            WeightsError: says which, and the remedy.
        """

    def write(self, name: str, chunks: Iterable[Chunk]) -> None:
        """Write one file, a path with ``/``; a chunk is let go before the next one is asked for."""

    def write_folder(self, fill: Callable[[Path], object]) -> None:
        """Write the files that ``fill`` puts into the folder it is given."""

    def commit(self) -> dict[str, int]:
        """End; returns the bytes of every file by its name."""

    def abort(self) -> None:
        """Leave nothing behind, as far as that is possible."""


class FolderSink:
    """A folder, there when it is whole. Implements ``Sink``."""

    def __init__(self, folder: Path | str) -> None:
        """Name the folder; it must not exist yet, or be empty."""
        self.folder = Path(folder)
        self._scratch = self.folder.with_name(f".{self.folder.name}.tmp-{uuid.uuid4().hex[:8]}")

    def open(self, needed_bytes: int) -> None:
        """Look at the folder and at its disk, and make a hidden folder beside it."""
        _require_room(self.folder, needed_bytes)
        self._scratch.mkdir(parents=True)

    def write(self, name: str, chunks: Iterable[Chunk]) -> None:
        """Write and sync."""
        path = self._scratch / name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                del chunk  # before the next one is made
            file.flush()
            os.fsync(file.fileno())

    def write_folder(self, fill: Callable[[Path], object]) -> None:
        """Have them written in place."""
        fill(self._scratch)

    def commit(self) -> dict[str, int]:
        """Sync the folders, and give the name."""
        for place in {path.parent for path in self._scratch.rglob("*")}:
            _sync_folder(place)
        self._scratch.replace(self.folder)
        _sync_folder(self.folder.parent)
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}

    def abort(self) -> None:
        """Remove the hidden folder."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def _require_room(folder: Path, needed_bytes: int) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise WeightsError(f"{folder} is not empty; give a new folder, or empty that one")
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{folder} is a file; give a new folder")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise WeightsError(
            f"{folder}: the weights need {needed_bytes:,} bytes and the disk has {free_bytes:,} "
            "free; choose another disk, or dtype bfloat16"
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
