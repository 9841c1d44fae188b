"""Read a whole checkpoint and say of each object what is wrong with it. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ringworld_workers.checkpoint.layout import (
    MANIFEST,
    CheckpointError,
    CheckpointRef,
    Manifest,
    StoredObject,
)
from ringworld_workers.checkpoint_tools.choose import manifest_of
from ringworld_workers.checkpoint_tools.parallel import in_parallel
from ringworld_workers.checkpoint_tools.pieces import (
    PIECE_BYTES,
    Chunk,
    Piece,
    pieces_of,
    read_piece,
)
from ringworld_workers.store.base import NotFound, ObjectInfo, Store

READERS = 6
_KINDS = {"adamw": ("param", "exp_avg", "exp_avg_sq"), "sgd": ("param",)}


@dataclass(frozen=True)
class ObjectReport:
    """One object of a checkpoint."""

    key: str
    size: int
    """Bytes that the manifest says."""
    num_ranges: int
    problems: tuple[str, ...]
    """What is wrong with it; empty: every byte is as it was written."""


@dataclass(frozen=True)
class VerifyReport:
    """What was found by reading all of a checkpoint."""

    ref: CheckpointRef
    objects: tuple[ObjectReport, ...]
    problems: tuple[str, ...]
    """What is wrong with the manifest, or with all objects together."""
    unreferenced: tuple[ObjectInfo, ...]
    """Objects that no one reads: what interrupted saves of the step have left."""
    bytes_read: int

    @property
    def sound(self) -> bool:
        """Whether the checkpoint loads bit for bit as it was saved."""
        return not self.problems and not any(found.problems for found in self.objects)


def total_bytes(store: Store, ref: CheckpointRef) -> int:
    """Bytes that ``verify`` will read, as the manifest says; 0 where it cannot be read."""
    try:
        return sum(stored.size for stored in manifest_of(store, ref).objects)
    except CheckpointError:
        return 0


def verify(
    store: Store, ref: CheckpointRef, on_bytes: Callable[[int], object] = lambda _: None
) -> VerifyReport:
    """Check every byte of a checkpoint, and that nothing is missing.

    That its ranges hold every element of every tensor once is checked as the manifest is read.
    Several threads read, each into a buffer of its own: memory does not grow with the checkpoint.

    Args:
        store: that holds it.
        ref: which one.
        on_bytes: told how many more bytes were read.

    Raises:
        StoreError: the store failed. An object that is absent is a finding, not an error.
    """
    held = {info.key: info for info in store.list(ref.key)}
    try:
        manifest = manifest_of(store, ref)
    except CheckpointError as error:
        return VerifyReport(ref, (), (str(error),), (), 0)
    problems: dict[str, list[str]] = {stored.key: [] for stored in manifest.objects}
    for stored in manifest.objects:
        problems[stored.key] += _outside(stored, held.get(stored.key))
    buffers = threading.local()

    def read(piece: Piece) -> tuple[Piece, list[Chunk], bool]:
        if not hasattr(buffers, "held"):
            buffers.held = memoryview(bytearray(PIECE_BYTES))
        try:
            return piece, read_piece(store, piece, buffers.held), True
        except NotFound:  # removed since it was listed
            return piece, [], False

    bytes_read = 0
    for piece, wrong, there in in_parallel(read, _readable(manifest, held), READERS):
        bytes_read += piece.length
        on_bytes(piece.length)
        if not there and "it is missing" not in problems[piece.key]:
            problems[piece.key].append("it is missing")
        problems[piece.key] += [describe(chunk) for chunk in wrong]
    return VerifyReport(
        ref,
        tuple(
            ObjectReport(stored.key, stored.size, len(stored.ranges), tuple(problems[stored.key]))
            for stored in manifest.objects
        ),
        tuple(_missing_kinds(manifest)),
        tuple(
            info
            for key, info in held.items()
            if key not in problems and key != f"{ref.key}/{MANIFEST}"
        ),
        bytes_read,
    )


def describe(chunk: Chunk) -> str:
    """Which bytes have a wrong checksum, and what they are."""
    end = chunk.offset + chunk.length
    return (
        f"bytes {chunk.offset:,} to {end:,}, of {chunk.part.kind} of {chunk.part.tensor}: the "
        "checksum is wrong"
    )


def _outside(stored: StoredObject, info: ObjectInfo | None) -> Iterator[str]:
    """What is wrong with an object that shows without reading it."""
    if info is None:
        yield "it is missing"
    elif info.size != stored.size:
        how = "it is cut off" if info.size < stored.size else "it is too long"
        yield f"{how}: it holds {info.size:,} bytes instead of {stored.size:,}"
    unchecked = stored.size - sum(part.length_bytes for part in stored.ranges)
    if unchecked:
        yield f"{unchecked:,} of its bytes are in no range, and have no checksum"


def _missing_kinds(manifest: Manifest) -> Iterator[str]:
    """Whatever kinds a manifest has cover every tensor, but it might lack one."""
    held = {part.kind for stored in manifest.objects for part in stored.ranges}
    for kind in _KINDS.get(manifest.optimizer.name, ()):
        if kind not in held:
            yield f"no object holds {kind}, which {manifest.optimizer.name} needs"


def _readable(manifest: Manifest, held: dict[str, ObjectInfo]) -> Iterator[Piece]:
    """The pieces that are there: of an object that is cut off, those before the cut."""
    for stored in manifest.objects:
        size = held[stored.key].size if stored.key in held else 0
        for piece in pieces_of(stored):
            if piece.offset + piece.length <= size:
                yield piece
