"""An upload's bytes, cut into parts and sent without a copy."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from awscrt.checksums import crc32c

from ringworld_workers.store.base import Chunk
from ringworld_workers.store.retry import Watch

_LARGEST_PART_BYTES = 4 << 30
_SMALL_BYTES = 256 << 10
_PARTS_OF_A_SIZE = 1000


class Part:
    """Consecutive bytes that lie in several places."""

    def __init__(self, views: list[memoryview]) -> None:
        """Take byte views; they stay as they are until the part has arrived."""
        self.views = views
        self.size = sum(len(view) for view in views)
        checksum = 0
        for view in views:
            checksum = crc32c(view, checksum)
        self.crc32c: int = checksum


def body_of(part: Part, watch: Watch) -> bytes | Body:
    """What to give botocore for a part.

    For a file, it would ask the server's leave before it sends any of it: a round trip that
    matters for what is small.
    """
    return b"".join(part.views) if part.size <= _SMALL_BYTES else Body(part, watch)


def cut(chunks: Iterable[Chunk], part_bytes: int) -> Iterator[Part]:
    """Cut a stream into parts; the last may be smaller, and is empty if the stream is.

    After every thousand parts their size doubles, so that the largest object has fewer than
    10,000 while a small one does not wait for large parts.
    """
    number, views, size = 0, list[memoryview](), 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while view:
            wanted = part_size(number, part_bytes) - size
            views.append(view[:wanted])
            size += len(views[-1])
            view = view[wanted:]
            if len(views[-1]) == wanted:
                yield Part(views)
                number, views, size = number + 1, [], 0
    if views or not number:
        yield Part(views)


def part_size(number: int, part_bytes: int) -> int:
    """Bytes of the part with this number, counted from 0."""
    return min(part_bytes << (number // _PARTS_OF_A_SIZE), max(part_bytes, _LARGEST_PART_BYTES))


class Body(io.RawIOBase):
    """A part as the file that botocore wants to send: it reads views, not copies."""

    def __init__(self, part: Part, watch: Watch) -> None:
        """Start at the part's first byte; ``watch`` hears of what is read."""
        self._views, self._size, self._watch = part.views, part.size, watch
        self._position = 0
        self._starts = [0, *itertools.accumulate(len(view) for view in part.views)]
        self._index = 0

    def __len__(self) -> int:
        """Bytes of the whole part."""
        return self._size

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is: botocore reads a body once to sign it and once to send it."""
        return True

    def tell(self) -> int:
        """Bytes from the part's start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = min(max(0, base + offset), self._size)
        self._index = 0
        return self._position

    def read(self, size: int | None = -1) -> Any:
        """At most ``size`` of the next bytes: a view of them, or a copy if the pieces are small.

        Raises:
            Passing: the attempt does not get on, or was given up.
        """
        wanted = self._size - self._position
        if size is not None and size >= 0:
            wanted = min(size, wanted)
        pieces = []
        left = wanted
        while left:
            while self._starts[self._index + 1] <= self._position:
                self._index += 1
            begin = self._position - self._starts[self._index]
            piece = self._views[self._index][begin : begin + left]
            pieces.append(piece)
            left -= len(piece)
            self._position += len(piece)
        self._watch.moved(wanted)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        """Copy the next bytes into a buffer: what awscrt reads by, to sign them."""
        target = memoryview(buffer).cast("B")
        done = 0
        while done < len(target) and (piece := self.read(len(target) - done)):
            target[done : done + len(piece)] = piece
            done += len(piece)
        return done
