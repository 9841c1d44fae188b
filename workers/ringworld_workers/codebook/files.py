"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(place: Path) -> Iterator[Path]:
    """A name to write to that becomes ``place`` when all is written, and is removed on an error.

    Args:
        place: where the file is to lie; its folder exists.
    """
    temporary = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
