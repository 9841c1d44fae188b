"""Read a whole checkpoint and say of each object what is wrong with it. No torch here."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    MANIFEST,
    CheckpointError,
    CheckpointRef,
    Manifest,
    StoredObject,
    StoredRange,
)
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
_ELEMENT_BYTES = {"float32": 4}


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
        return sum(stored.size for stored in _manifest(store, ref).objects)
    except CheckpointError:
        return 0


def verify(
    store: Store, ref: CheckpointRef, on_bytes: Callable[[int], object] = lambda _: None
) -> VerifyReport:
    """Check every byte of a checkpoint, and that nothing is missing.

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
        manifest = _manifest(store, ref)
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
        tuple(coverage_problems(manifest)),
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


def coverage_problems(manifest: Manifest) -> list[str]:
    """Elements of a tensor that no range holds, or more than one, and ranges of no tensor."""
    problems = []
    held: dict[tuple[str, str], list[StoredRange]] = defaultdict(list)
    for stored in manifest.objects:
        for part in stored.ranges:
            held[part.tensor, part.kind].append(part)
    kinds = list(_KINDS.get(manifest.optimizer.name, ("param",)))
    kinds += sorted({kind for _, kind in held} - set(kinds))
    for tensor, shape in manifest.tensors.items():
        for kind in kinds:
            position, numel = 0, prod(shape)
            for part in sorted(held.pop((tensor, kind), []), key=lambda part: part.start):
                if part.start != position:
                    what = "no object holds" if part.start > position else "two objects hold"
                    low, high = sorted((position, part.start))
                    problems.append(f"{what} elements {low:,} to {high:,} of {kind} of {tensor}")
                position = max(position, part.start + part.numel)
            if position != numel:
                what = "no object holds" if position < numel else "there should not be"
                low, high = sorted((position, numel))
                problems.append(f"{what} elements {low:,} to {high:,} of {kind} of {tensor}")
    problems += [f"{kind} of {tensor} is of no tensor of the model" for tensor, kind in held]
    return problems


def _manifest(store: Store, ref: CheckpointRef) -> Manifest:
    key = f"{ref.key}/{MANIFEST}"
    try:
        return Manifest.from_json(store.get(key), key)
    except NotFound:
        raise CheckpointError(f"{key} is missing: the checkpoint was removed meanwhile") from None


def _outside(stored: StoredObject, info: ObjectInfo | None) -> Iterator[str]:
    """What is wrong with an object that shows without reading it."""
    if info is None:
        yield "it is missing"
    elif info.size != stored.size:
        how = "it is cut off" if info.size < stored.size else "it is too long"
        yield f"{how}: it holds {info.size:,} bytes instead of {stored.size:,}"
    end = 0
    for part in sorted(stored.ranges, key=lambda part: part.offset):
        name = f"{part.kind} of {part.tensor}"
        if part.offset != end:
            low, high = sorted((end, part.offset))
            whose = "no range" if end < part.offset else "two ranges"
            yield f"bytes {low:,} to {high:,} are of {whose}, before {name}"
        if part.length_bytes != part.numel * _ELEMENT_BYTES.get(part.dtype, 0):
            yield (
                f"{name} has {part.length_bytes:,} bytes for {part.numel:,} elements of "
                f"{part.dtype}"
            )
        if len(part.crc32c) != -(-part.length_bytes // CHUNK_BYTES):
            yield f"{name} has {len(part.crc32c)} checksums for {part.length_bytes:,} bytes"
        end = part.offset + part.length_bytes
    if end != stored.size:
        yield f"its ranges end at byte {end:,} of {stored.size:,}"


def _readable(manifest: Manifest, held: dict[str, ObjectInfo]) -> Iterator[Piece]:
    """The pieces that are there: of an object that is cut off, those before the cut."""
    for stored in manifest.objects:
        size = held[stored.key].size if stored.key in held else 0
        for piece in pieces_of(stored):
            if piece.offset + piece.length <= size:
                yield piece
