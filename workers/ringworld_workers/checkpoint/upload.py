"""One rank's part of a save on its way to the store."""

from __future__ import annotations

from collections.abc import Sequence

from ringworld_workers.checkpoint.background import Background
from ringworld_workers.checkpoint.layout import StoredObject
from ringworld_workers.checkpoint.save_id import SaveId
from ringworld_workers.checkpoint.snapshot import ChecksummedStream, SnapshotBuffer
from ringworld_workers.engine.base import OwnedRange
from ringworld_workers.store.base import Store

Upload = Background[list[StoredObject]]


def upload_snapshot(
    store: Store,
    buffer: SnapshotBuffer,
    ranges: Sequence[OwnedRange],
    save: SaveId,
    folder: str,
    rank: int,
) -> Upload:
    """Copy the ranges, then write one object of them; the copy alone has ended on return."""
    stream = ChecksummedStream(buffer.take(ranges))
    key = save.key(folder, rank)

    def run() -> list[StoredObject]:
        store.put(key, stream)
        return [stream.stored(key)]

    return Background("checkpoint-upload", run)


def upload_pieces(
    store: Store,
    buffer: SnapshotBuffer,
    ranges: Sequence[OwnedRange],
    save: SaveId,
    folder: str,
    rank: int,
) -> Upload:
    """Copy and write an object for each part of the ranges that the buffer can hold.

    The engine must stand still until it has ended.
    """

    def run() -> list[StoredObject]:
        stored = []
        for number, piece in enumerate(buffer.pieces(ranges)):
            stream = ChecksummedStream(buffer.take(piece))
            key = save.key(folder, rank, number)
            store.put(key, stream)
            stored.append(stream.stored(key))
        return stored

    return Background("checkpoint-upload", run, yields=False)
