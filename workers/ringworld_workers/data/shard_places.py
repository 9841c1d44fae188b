"""Where the files of a prepared dataset lie."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ringworld_workers.data.files import DataError
from ringworld_workers.data.shard_format import META_FILE, ShardEntry


class LocalShards:
    """A dataset in a folder."""

    def __init__(self, folder: Path) -> None:
        """Look at a folder; nothing is read."""
        self._folder = folder

    def where(self, file: str) -> str:
        """What messages call a file."""
        return str(self._folder / file)

    def read(self, file: str) -> bytes:
        """A small file.

        Raises:
            DataError: it is not there, or cannot be read.
        """
        try:
            return (self._folder / file).read_bytes()
        except FileNotFoundError:
            if file == META_FILE:
                raise DataError(
                    f"{self._folder} holds no {META_FILE}; point it at a dataset's folder as "
                    f"`ringworld data build` wrote it"
                ) from None
            raise DataError(f"{self.where(file)} is missing; build the data again") from None
        except OSError as error:
            raise DataError(f"cannot read {self.where(file)}: {error.strerror}") from error

    def open(self, entry: ShardEntry) -> pa.MemoryMappedFile:
        """A shard, mapped into memory.

        Raises:
            DataError: it is missing, or not as long as when it was written.
        """
        return map_shard(self._folder / entry["file"], entry)


def map_shard(path: Path, entry: ShardEntry) -> pa.MemoryMappedFile:
    """Map a shard into memory; its length is compared, its digest is not.

    Raises:
        DataError: it is missing, or not as long as when it was written.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing; build the data again") from None
    if size != entry["bytes"]:
        raise DataError(
            f"{path} has {size} bytes, {entry['bytes']} were written; build the data again"
        )
    return pa.memory_map(str(path), "r")
