"""A file system that is full soon: a real one, so that the system itself refuses to write."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 4 MiB; it lasts as long as the process in whose sight alone it lies."""
    place = folder / "disk"
    place.mkdir()
    script = f"mount -t tmpfs -o size=4m none {place} && echo ready && exec cat"
    with subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            pytest.skip("this machine lets nobody mount a file system of his own")
        yield Path(f"/proc/{holder.pid}/root{place}")
        holder.stdin.close()


def fill(disk: Path) -> Path:
    """Leave not a byte free; removing the file that it returns makes room again."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler
