"""A copy of this rank's state in host memory: the only moment that training waits for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from awscrt.checksums import crc32c

from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    OptimizerState,
    StoredObject,
    StoredRange,
    TrainState,
)
from ringworld_workers.engine.base import Engine

_ELEMENT_BYTES = 4


@dataclass(frozen=True)
class Snapshot:
    """State as of one moment, untouched by the steps that follow."""

    state: TrainState
    optimizer: OptimizerState
    shapes: dict[str, tuple[int, ...]]
    places: tuple[tuple[str, str, int, int], ...]
    """(tensor, kind, start, numel) of each range, in the order of the buffer."""
    buffer: memoryview
    """The ranges' fp32 values one after the other, as bytes."""


class SnapshotBuffer:
    """Host memory that is allocated by the first snapshot and used again by all later ones."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._memory = torch.empty(0)

    def take(self, engine: Engine, state: TrainState) -> Snapshot:
        """Copy this rank's ranges. What an earlier snapshot held is overwritten."""
        ranges = engine.owned_ranges()
        numel = sum(owned.data.numel() for owned in ranges)
        if self._memory.numel() < numel:
            pinned = any(owned.data.is_cuda for owned in ranges)
            self._memory = torch.empty(numel, dtype=torch.float32, pin_memory=pinned)
        used = self._memory[:numel]
        parts = used.split([owned.data.numel() for owned in ranges]) if ranges else ()
        devices = {owned.data.device for owned in ranges if owned.data.is_cuda}
        for owned, part in zip(ranges, parts, strict=True):
            part.copy_(owned.data, non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        return Snapshot(
            state=state,
            optimizer=engine.optimizer_state(),
            shapes=engine.parameter_shapes(),
            places=tuple(
                (owned.tensor, owned.kind, owned.start, owned.data.numel()) for owned in ranges
            ),
            buffer=used.numpy().data.cast("B"),
        )


class ChecksummedStream:
    """A snapshot's bytes in chunks, checksummed on their way out.

    No chunk crosses the end of a range, so the checksums are those of the manifest.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        """Stream ``snapshot``; iterate once, then ask for ``stored``."""
        self._snapshot = snapshot
        self._ranges: list[StoredRange] = []

    def __iter__(self) -> Iterator[memoryview]:
        """The chunks in order."""
        self._ranges.clear()
        offset = 0
        for tensor, kind, start, numel in self._snapshot.places:
            length = numel * _ELEMENT_BYTES
            checksums = []
            for first in range(offset, offset + length, CHUNK_BYTES):
                chunk = self._snapshot.buffer[first : min(first + CHUNK_BYTES, offset + length)]
                checksums.append(crc32c(chunk))
                yield chunk
            self._ranges.append(
                StoredRange(tensor, kind, start, numel, offset, length, "float32", tuple(checksums))
            )
            offset += length

    def stored(self, key: str) -> StoredObject:
        """The object's entry for the manifest."""
        return StoredObject(key, len(self._snapshot.buffer), tuple(self._ranges))
