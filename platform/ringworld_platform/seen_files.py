"""What files said that were read before and have not changed since, as their stamps tell."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Generic, TypeVar

RACY_SECONDS = 0.5
"""A file that is younger may change once more and keep its stamp."""
_Stamp = tuple[int, int, int]

T = TypeVar("T")


class SeenFiles(Generic[T]):
    """Remembers what it has read. Any thread may ask."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._seen: dict[str, tuple[_Stamp, T]] = {}

    def get(self, path: str, read: Callable[[], T]) -> T:
        """What a file says: as it was read before, or as ``read`` gives it.

        Args:
            path: the file; its writers replace it as a whole.
            read: reads it.

        Returns:
            What others may be given too: not to be changed.

        Raises:
            FileNotFoundError: there is none.
        """
        about = os.stat(path)
        stamp = about.st_ino, about.st_mtime_ns, about.st_size
        seen = self._seen.get(path)
        if seen is not None and seen[0] == stamp:
            return seen[1]
        found = read()
        if time.time() - about.st_mtime > RACY_SECONDS:
            self._seen[path] = stamp, found
        else:
            self._seen.pop(path, None)
        return found
