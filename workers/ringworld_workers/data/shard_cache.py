"""Shards of remote datasets on a node's own disk, within a bound, shared by the node's workers.

A shard is named by its digest, so equal shards of two datasets are one file. Whoever needs one that
is not there downloads it, under a lock that lies on the unfinished file itself: others wait for it,
and the lock of a process that was killed is free at once. Files come to be by one rename, after
their digest was compared. The shard that was not used for longest makes room.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from ringworld_workers.data.files import DataError
from ringworld_workers.data.shard_format import ShardEntry
from ringworld_workers.data.source_walk import BLOCK_SHARDS

log = logging.getLogger(__name__)

WAIT_SECONDS = 600.0
"""How long a worker waits for one that downloads the shard it needs, or for room."""
_PAUSE_SECONDS = 0.05
_LOCK_FILE = ".lock"

Fetch = Callable[[BinaryIO], None]
"""Writes a whole, verified shard into a file that is open for writing."""


class ShardCache:
    """A folder of shards that does not outgrow its bound. Any thread or process may use it."""

    def __init__(self, folder: Path | str, max_bytes: int) -> None:
        """Name the folder; it is created when the first shard comes.

        Args:
            folder: on the node's own disk.
            max_bytes: most bytes of all files in it, unfinished ones included.
        """
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._needed = 0
        self._wanted: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._fetcher: threading.Thread | None = None

    def admit(self, entries: list[ShardEntry]) -> None:
        """Reckon with a dataset: the shards that are shuffled together must lie here at once.

        Raises:
            DataError: they do not fit beside those of the other datasets.
        """
        sizes = sorted((entry["bytes"] for entry in entries), reverse=True)
        self._needed += sum(sizes[:BLOCK_SHARDS])
        if self._needed > self.max_bytes:
            raise DataError(
                f"data.shard_cache.max_bytes={self.max_bytes:,} is too small for this stage: the "
                f"{BLOCK_SHARDS} largest shards of each remote source, which are shuffled "
                f"together, have {self._needed:,} bytes; raise it to that or more"
            )

    @property
    def roomy(self) -> bool:
        """Whether shards may be fetched before those of their block are done with."""
        return 2 * self._needed <= self.max_bytes

    def open(self, entry: ShardEntry, fetch: Fetch) -> pa.MemoryMappedFile:
        """A shard mapped into memory, downloaded first where it is not here.

        A map outlives the file's removal, so nothing that is being read can disappear.

        Raises:
            DataError: ``fetch`` raised it, or the cache gave no place within the deadline.
        """
        path = self.folder / f"{entry['sha256']}.arrow"
        if entry["bytes"] > self.max_bytes:
            raise DataError(
                f"data.shard_cache.max_bytes={self.max_bytes:,} has no room for {entry['file']} of "
                f"{entry['bytes']:,} bytes; raise it to several times that"
            )
        deadline = time.monotonic() + WAIT_SECONDS
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            with self._locked():
                if path.is_file() and path.stat().st_size == entry["bytes"]:
                    os.utime(path)
                    return pa.memory_map(str(path), "r")
            with self._part(entry, deadline) as part:
                if part is None:
                    continue  # somebody else has finished it
                self._reserve(entry, part, deadline)
                fetch(part)
                part.flush()
                os.fsync(part.fileno())
                # Names change under the lock alone: whoever makes room sees each file once.
                with self._locked():
                    os.replace(path.with_suffix(".part"), path)

    def prefetch(self, task: Callable[[], object]) -> None:
        """Run a download in the background; its failure is left to whoever needs the shard."""
        if self._fetcher is None:
            self._fetcher = threading.Thread(target=self._run, name="shards", daemon=True)
            self._fetcher.start()
        self._wanted.put(task)

    def _run(self) -> None:
        while True:
            try:
                self._wanted.get()()
            except Exception as error:
                log.warning("a shard could not be fetched ahead: %s", error)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock, for as long as it takes to look around."""
        with (self.folder / _LOCK_FILE).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _part(self, entry: ShardEntry, deadline: float) -> Iterator[BinaryIO | None]:
        """The unfinished file, locked; None once it was finished while waiting for the lock."""
        path = self.folder / f"{entry['sha256']}.part"
        with self._locked():
            if path.with_suffix(".arrow").is_file():
                file = None
            else:
                file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        if file is None:
            yield None
            return
        with file:
            while not _try_lock(file):
                self._pause(entry, deadline)
            with self._locked():  # whoever takes it for abandoned has removed it by now, or never
                mine = _is_at(file, path)
            if not mine:
                yield None
                return
            try:
                yield file
            finally:
                # After the rename there is no such file any more.
                with suppress(FileNotFoundError), self._locked():
                    path.unlink()

    def _reserve(self, entry: ShardEntry, part: BinaryIO, deadline: float) -> None:
        """Make room, and take it: the file has its final length from the start."""
        part.seek(0)
        part.truncate(0)
        while True:
            with self._locked():
                if self._evict(entry["bytes"]):
                    part.truncate(entry["bytes"])
                    return
            self._pause(entry, deadline)

    def _evict(self, needed: int) -> bool:
        """Remove shards, least recently used first, until ``needed`` bytes are free."""
        files = [(path, path.stat()) for path in self.folder.iterdir() if path.suffix]
        total = sum(stat.st_size for _, stat in files)
        files.sort(key=lambda file: file[1].st_mtime_ns)
        for path, stat in files:
            if total + needed <= self.max_bytes:
                break
            if path.suffix == ".arrow" or (path.suffix == ".part" and _abandoned(path)):
                path.unlink()
                total -= stat.st_size
        return total + needed <= self.max_bytes

    def _pause(self, entry: ShardEntry, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise DataError(
                f"waited {WAIT_SECONDS:g} s in {self.folder} for {entry['file']}, which another "
                "worker downloads or which has no room beside what others download; look at "
                "that worker's log, or raise data.shard_cache.max_bytes"
            )
        time.sleep(_PAUSE_SECONDS)


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _abandoned(path: Path) -> bool:
    """Whether nobody downloads into this file any more, and it takes room."""
    with path.open("rb") as file:
        return path.stat().st_size > 0 and _try_lock(file)
