"""One builder at a time for each prepared folder; and what killed builders left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ringworld_workers.data.files import DataError

BUILDING = ".building-"
"""Folders of unfinished builds begin so; the lock of each lies beside it."""
ABANDONED_SECONDS = 7 * 86_400.0
"""An unfinished build that nobody has gone on with for so long is removed."""

_POLL_SECONDS = 0.5


def building_folder(cache: Path, digest: str) -> Path:
    """Where the build of a digest is under way: the same for every try."""
    return cache / f"{BUILDING}{digest[:16]}"


@contextmanager
def sole_builder(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a building folder; wait while another builder has it.

    The lock ends with its process, however that ends.

    Args:
        folder: of the build.
        on_wait: called now and then while waiting.

    Raises:
        DataError: the file system has no locks.
    """
    path = _lock_of(folder)
    while (descriptor := _take(path)) is None:
        on_wait()
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        if not folder.exists():
            path.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(cache: Path) -> None:
    """Remove unfinished builds that nobody works on, nor has for a week."""
    for folder in cache.glob(f"{BUILDING}*"):
        with suppress(OSError):
            if not folder.is_dir() or _touched(folder) > time.time() - ABANDONED_SECONDS:
                continue
            path = _lock_of(folder)
            descriptor = _take(path)
            if descriptor is None:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _touched(folder: Path) -> float:
    """When a result last appeared in it."""
    return max(path.stat().st_mtime for path in (folder, *folder.glob("**/")))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _take(path: Path) -> int | None:
    """The locked file's descriptor, or None while another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise DataError(
                    f"{path.parent}: this file system has no locks; put the cache on another"
                ) from error
            raise
        # Its last holder may have removed the file since it was opened: then this lock is nobody's.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)
