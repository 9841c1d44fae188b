"""Files that appear whole, outlive a power cut, and are nobody else's to read."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ringworld_workers.store.base import Chunk
from ringworld_workers.store.retry import Passing

TEMPORARY = ".tmp-"
LOCK = ".lock-"
_FILE_MODE = 0o600
_FOLDER_MODE = 0o700
_LOCK_PAUSE_SECONDS = 0.01


class SourceError(Exception):
    """What the source of an object's bytes raised, which is not the store's failure."""

    def __init__(self, error: Exception) -> None:
        """Carry the error past those who look for the file system's."""
        super().__init__(error)
        self.error = error


class Replay:
    """A stream that can be written again: it is iterated once, and its chunks are kept."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        """Take the stream; nothing is read yet."""
        self._source = iter(chunks)
        self._kept: list[Chunk] = []

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks, those that were read before first.

        Raises:
            SourceError: the source broke; then it must not be iterated again.
        """
        yield from self._kept
        while True:
            try:
                chunk = next(self._source)
            except StopIteration:
                return
            except Exception as error:
                raise SourceError(error) from error
            self._kept.append(chunk)
            yield chunk


@contextmanager
def temporary_file(path: Path, chunks: Iterable[Chunk]) -> Iterator[Path]:
    """A complete, synced, hidden file beside ``path``; gone afterwards."""
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}"
    descriptor = _create(temporary)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for chunk in chunks:
                _write_all(file.write, memoryview(chunk).cast("B"))
            os.fsync(descriptor)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def walk(folder: Path) -> Iterator[Path]:
    """Every file under a folder; none if it is absent."""
    for parent, _, names in os.walk(folder, onerror=_raise_unless_absent):
        for name in names:
            yield Path(parent, name)


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock file of one object; the system frees it if this process dies.

    Raises:
        Passing: another process has held it all this time.
    """
    lock = path.parent / f"{LOCK}{path.name}"
    deadline = time.monotonic() + seconds
    while True:
        _make_folder(path.parent)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, _FILE_MODE)
        with os.fdopen(descriptor, "rb"):
            _lock(descriptor, deadline)
            try:
                current = os.path.samestat(os.fstat(descriptor), lock.stat())
            except FileNotFoundError:
                current = False
            if current:  # else the object was deleted, lock file and all, while this call waited
                yield
                return


def _lock(descriptor: int, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Passing("another process holds its lock file") from None
        time.sleep(_LOCK_PAUSE_SECONDS)


def _create(path: Path) -> int:
    """Open a new file for writing, with its folders; a clean-up may take those away meanwhile."""
    for attempt in range(5):
        try:
            _make_folder(path.parent)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)
        except FileNotFoundError:
            if attempt == 4:
                raise
    raise AssertionError("unreachable")


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it; each survives a power cut as the files in it do."""
    if folder.exists():
        return
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(_FOLDER_MODE, exist_ok=True)
        sync_folder(place.parent)


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    while data:
        written = write(data)
        data = data[written or 0 :]


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
