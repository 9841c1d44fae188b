"""An object's ranges as pieces to read, each chunk with the checksum that it must have.

No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from awscrt.checksums import crc32c

from ringworld_workers.checkpoint.layout import CHUNK_BYTES, StoredObject, StoredRange
from ringworld_workers.store.base import Store

PIECE_BYTES = 16 * CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of an object that have one checksum."""

    offset: int
    """First byte in the object."""
    length: int
    crc32c: int
    part: StoredRange
    """The range that it is a part of."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks that lie one after the other in an object, at most ``PIECE_BYTES`` of them."""

    key: str
    chunks: tuple[Chunk, ...]

    @property
    def offset(self) -> int:
        """First byte in the object."""
        return self.chunks[0].offset

    @property
    def length(self) -> int:
        """Bytes."""
        return sum(chunk.length for chunk in self.chunks)


def pieces_of(stored: StoredObject) -> Iterator[Piece]:
    """Every byte that the object's ranges cover, in the order of the object."""
    held: list[Chunk] = []
    length = 0
    for chunk in _chunks_of(stored):
        apart = bool(held) and chunk.offset != held[-1].offset + held[-1].length
        if held and (apart or length + chunk.length > PIECE_BYTES):
            yield Piece(stored.key, tuple(held))
            held, length = [], 0
        held.append(chunk)
        length += chunk.length
    if held:
        yield Piece(stored.key, tuple(held))


def _chunks_of(stored: StoredObject) -> Iterator[Chunk]:
    for part in sorted(stored.ranges, key=lambda part: part.offset):
        for number, checksum in enumerate(part.crc32c):
            begin = number * CHUNK_BYTES
            length = min(CHUNK_BYTES, part.length_bytes - begin)
            yield Chunk(part.offset + begin, length, checksum, part)


def read_piece(store: Store, piece: Piece, buffer: memoryview) -> list[Chunk]:
    """Read a piece, once more where a checksum is wrong: the way here may have been at fault.

    Args:
        store: that holds the object.
        piece: of the object.
        buffer: filled with the piece's bytes, in whatever state they are.

    Returns:
        The chunks whose checksum was wrong both times.

    Raises:
        StoreError: the object is absent or shorter, or the store failed.
    """
    wrong: list[Chunk] = []
    for _ in range(2):
        store.read_into(piece.key, piece.offset, [buffer[: piece.length]])
        wrong = wrong_chunks(piece, buffer)
        if not wrong:
            break
    return wrong


def wrong_chunks(piece: Piece, data: memoryview) -> list[Chunk]:
    """The chunks of a piece whose bytes in ``data`` have another checksum."""
    wrong = []
    for chunk in piece.chunks:
        begin = chunk.offset - piece.offset
        if crc32c(data[begin : begin + chunk.length]) != chunk.crc32c:
            wrong.append(chunk)
    return wrong
