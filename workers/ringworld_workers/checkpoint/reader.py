"""Loads a checkpoint into any engine on any mesh: each rank reads the ranges that it owns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from awscrt.checksums import crc32c

from ringworld_workers.checkpoint.catalog import committed as committed
from ringworld_workers.checkpoint.catalog import newest as newest
from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    MANIFEST,
    CheckpointRef,
    Manifest,
    StoredRange,
    TrainState,
)
from ringworld_workers.checkpoint.layout import CheckpointError as CheckpointError
from ringworld_workers.engine.base import Engine, OwnedRange
from ringworld_workers.mesh import Mesh
from ringworld_workers.store.base import Store, StoreError

_READ_BYTES = 16 * CHUNK_BYTES
_ELEMENT_BYTES = 4


def read_manifest(store: Store, ref: CheckpointRef) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is absent or damaged.
    """
    key = f"{ref.key}/{MANIFEST}"
    try:
        return Manifest.from_json(store.get(key), key)
    except StoreError as error:
        raise CheckpointError(f"checkpoint {ref.key} cannot be read: {error}") from error


def load(
    store: Store, ref: CheckpointRef, engine: Engine, mesh: Mesh, *, with_optimizer: bool
) -> TrainState:
    """Bring an engine to a checkpoint's state. A collective.

    Every byte is checked against its checksum before it is used. If any rank fails, all raise.

    Args:
        store: that holds the checkpoint.
        ref: which one.
        engine: of any kind, ZeRO stage and mesh, around the same parameters.
        mesh: of the engine.
        with_optimizer: load the optimizer's moments and hyper-parameters too; else only weights,
            and the optimizer starts afresh.

    Raises:
        CheckpointError: the manifest or an object is absent or damaged, or the checkpoint is of
            another model or optimizer; names the object, and the range where it is one.
    """
    manifest: Manifest | None = None
    failure = None
    try:
        manifest = read_manifest(store, ref)
        _require_same_parameters(manifest, engine, ref)
        if with_optimizer:
            _require_same_optimizer(manifest, engine, ref)
    except CheckpointError as error:
        failure = error
    _agree(failure, mesh)
    assert manifest is not None  # noqa: S101 - _agree has raised otherwise
    source = RangeReader(store, manifest)

    def fill(ranges: Sequence[OwnedRange]) -> None:
        failure = None
        try:
            for wanted in ranges:
                source.read_into(wanted)
        except CheckpointError as error:
            failure = error
        _agree(failure, mesh)

    engine.load_ranges(fill, manifest.optimizer if with_optimizer else None)
    return manifest.state


def _require_same_parameters(manifest: Manifest, engine: Engine, ref: CheckpointRef) -> None:
    held, wanted = manifest.tensors, engine.parameter_shapes()
    if held == wanted:
        return
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise CheckpointError(
                f"checkpoint {ref.key} is of another model: parameter {name} is "
                f"{held.get(name, 'absent')} in it and {wanted.get(name, 'absent')} in the model; "
                "resume with the model that it was saved from"
            )


def _require_same_optimizer(manifest: Manifest, engine: Engine, ref: CheckpointRef) -> None:
    held, wanted = manifest.optimizer, engine.optimizer_state()
    if held.name != wanted.name:
        raise CheckpointError(
            f"checkpoint {ref.key} holds the state of {held.name}, the job uses {wanted.name}; "
            "load its weights only, or use the same optimizer"
        )


def _agree(failure: CheckpointError | None, mesh: Mesh) -> None:
    """Raise on every rank if one failed: the others would wait for it in the next collective."""
    messages: list[str | None] = [None] * mesh.world_size
    text = str(failure) if failure is not None else None
    dist.all_gather_object(messages, text, group=mesh.control_group)
    for rank, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(
                message if mesh.world_size == 1 else f"rank {rank}: {message}"
            ) from failure


class RangeReader:
    """Reads parts of logical tensors out of a checkpoint's objects, verified."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        """Index the manifest's ranges by tensor and kind."""
        self._store = store
        self._index: dict[tuple[str, str], list[tuple[str, StoredRange]]] = defaultdict(list)
        for stored in manifest.objects:
            for found in stored.ranges:
                self._index[found.tensor, found.kind].append((stored.key, found))
        for ranges in self._index.values():
            ranges.sort(key=lambda entry: entry[1].start)

    def read_into(self, wanted: OwnedRange) -> None:
        """Fill ``wanted.data`` from whichever objects hold its elements.

        Raises:
            CheckpointError: an element is in no object, or an object is damaged.
        """
        position, stop = wanted.start, wanted.start + wanted.data.numel()
        for key, stored in self._index[wanted.tensor, wanted.kind]:
            if position >= stop:
                break
            if stored.start + stored.numel <= position:
                continue
            if stored.start > position:
                break
            end = min(stop, stored.start + stored.numel)
            first = position - wanted.start
            self._copy(key, stored, position, wanted.data[first : first + end - position])
            position = end
        if position < stop:
            raise CheckpointError(
                f"no object holds elements {position} to {stop} of {wanted.kind} of "
                f"{wanted.tensor}; resume from an older checkpoint"
            )

    def _copy(self, key: str, stored: StoredRange, position: int, target: torch.Tensor) -> None:
        """Copy ``target.numel()`` elements from ``position`` on, in reads of whole chunks."""
        first_byte = (position - stored.start) * _ELEMENT_BYTES
        end_byte = first_byte + target.numel() * _ELEMENT_BYTES
        aligned = first_byte - first_byte % CHUNK_BYTES
        for begin in range(aligned, end_byte, _READ_BYTES):
            finish = min(begin + _READ_BYTES, stored.length_bytes)
            # Whole chunks only, and none past what is needed.
            finish = min(finish, -(-end_byte // CHUNK_BYTES) * CHUNK_BYTES)
            data = self._verified(key, stored, begin, finish)
            low, high = max(begin, first_byte), min(finish, end_byte)
            # A writable copy, because torch warns of memory that it must not write to.
            part = bytearray(data[low - begin : high - begin])
            values = torch.frombuffer(part, dtype=torch.float32)
            offset = (low - first_byte) // _ELEMENT_BYTES
            target[offset : offset + values.numel()].copy_(values)

    def _verified(self, key: str, stored: StoredRange, begin: int, finish: int) -> memoryview:
        name = f"{stored.kind} of {stored.tensor} at byte {stored.offset + begin}"
        try:
            data = memoryview(self._store.read_range(key, stored.offset + begin, finish - begin))
        except StoreError as error:
            raise CheckpointError(
                f"object {key} cannot be read ({name}): {error}; resume from an older checkpoint"
            ) from error
        for first in range(0, len(data), CHUNK_BYTES):
            chunk = data[first : first + CHUNK_BYTES]
            if crc32c(chunk) != stored.crc32c[(begin + first) // CHUNK_BYTES]:
                raise CheckpointError(
                    f"object {key} is damaged: checksum of {name} is wrong; resume from an older "
                    "checkpoint"
                )
        return data
