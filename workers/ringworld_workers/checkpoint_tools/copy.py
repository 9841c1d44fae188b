"""Copy checkpoints between stores: streamed, verified on the way, committed last. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ringworld_workers.checkpoint.layout import (
    MANIFEST,
    CheckpointError,
    CheckpointRef,
    DamagedCheckpoint,
    Manifest,
    StoredObject,
)
from ringworld_workers.checkpoint.publish import require_objects
from ringworld_workers.checkpoint_tools.parallel import in_parallel
from ringworld_workers.checkpoint_tools.pieces import Piece, pieces_of, read_piece
from ringworld_workers.checkpoint_tools.verify import describe
from ringworld_workers.store.base import NotFound, Store, StoreError

_OBJECTS_AT_ONCE = 2
SPEC_FILE = "spec.yaml"
_CLAIM_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class Copied:
    """What copying one checkpoint has done."""

    num_copied: int
    """Objects that were written."""
    num_there: int
    """Objects that were there already, whole."""
    bytes_copied: int


def copy_records(source: Store, target: Store) -> None:
    """Copy what a run's checkpoints need beside them: its spec, and its claim to its name.

    Args:
        source: the run's folder, one above its checkpoints.
        target: the folder that it gets.

    Raises:
        CheckpointError: the target is another run's.
        StoreError: a store failed.
    """
    for name in (_CLAIM_FILE, SPEC_FILE):
        try:
            data = source.get(name)
        except NotFound:  # a run on file:// claims its name otherwise
            continue
        if not target.put_if_absent(name, data) and target.get(name) != data:
            raise CheckpointError(
                f"{target.url} is of another run: its {name} differs from that of {source.url}; "
                "copy to another place"
            )


def copy_checkpoint(
    source: Store,
    ref: CheckpointRef,
    target: Store,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> Copied:
    """Copy one checkpoint, so that nobody sees it in the target before it is whole.

    What an interrupted copy has left is used: objects whose every checksum is right stay.

    Args:
        source: that holds it.
        ref: which one.
        target: root of the checkpoints that it joins.
        on_bytes: told of more bytes, copied or found to be there.

    Raises:
        DamagedCheckpoint: a byte of the source is not as it was written.
        CheckpointError: the target has another checkpoint of that stage and step.
        StoreError: a store failed.
    """
    key = f"{ref.key}/{MANIFEST}"
    data = source.get(key)
    manifest = Manifest.from_json(data, key)
    _refuse_another(target, key, data)
    held = {info.key: info.size for info in target.list(ref.key)}
    stop = threading.Event()

    def bring(stored: StoredObject) -> int:
        """Bytes written; 0 of an object that was there, or is empty."""
        if held.get(stored.key) == stored.size and _is_whole(target, stored, stop):
            on_bytes(stored.size)
            return 0
        target.put(stored.key, _stream(source, stored, stop, on_bytes))
        return stored.size

    written = list(in_parallel(bring, manifest.objects, _OBJECTS_AT_ONCE, stop))
    require_objects(target, ref.key, manifest.objects)
    if not target.put_if_absent(key, data):
        _refuse_another(target, key, data)
    copied = sum(size > 0 for size in written)
    return Copied(copied, len(written) - copied, sum(written))


def _refuse_another(target: Store, key: str, data: bytes) -> None:
    try:
        found = target.get(key)
    except NotFound:
        return
    if found != data:
        raise CheckpointError(
            f"{target.url}/{key} is there already, and is that of another checkpoint; copy to "
            "another place"
        )


def _is_whole(store: Store, stored: StoredObject, stop: threading.Event) -> bool:
    """Whether an object of the right size has every byte as the manifest says."""
    if sum(part.length_bytes for part in stored.ranges) != stored.size:
        return False
    for piece in pieces_of(stored):
        _refuse_stopped(stop)
        if read_piece(store, piece, memoryview(bytearray(piece.length))):
            return False
    return True


def _stream(
    source: Store, stored: StoredObject, stop: threading.Event, on_bytes: Callable[[int], object]
) -> Iterator[memoryview]:
    """An object's bytes, the next piece read while one is written."""

    def read(piece: Piece) -> memoryview:
        data = memoryview(bytearray(piece.length))
        wrong = read_piece(source, piece, data)
        if wrong:
            raise DamagedCheckpoint(f"object {stored.key} is damaged: {describe(wrong[0])}")
        return data

    position = 0
    for piece, data in zip(pieces_of(stored), in_parallel(read, pieces_of(stored), 1), strict=True):
        _refuse_stopped(stop)
        if piece.offset != position:
            yield _unchecked(source, stored, position, piece.offset)
        yield data
        on_bytes(piece.length)
        position = piece.offset + piece.length
    if position != stored.size:
        yield _unchecked(source, stored, position, stored.size)


def _unchecked(source: Store, stored: StoredObject, begin: int, end: int) -> memoryview:
    """Bytes between ranges: nobody reads them, but offsets count them."""
    data = memoryview(bytearray(end - begin))
    source.read_into(stored.key, begin, [data])
    return data


def _refuse_stopped(stop: threading.Event) -> None:
    """End a thread whose result nobody waits for: another failed, or a person has interrupted."""
    if stop.is_set():
        raise StoreError("copy", "", "the copy was stopped")
