"""A copy of this rank's state in host memory: the only moment that training waits for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from awscrt.checksums import crc32c

from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    StateNotFinite,
    StoredObject,
    StoredRange,
)
from ringworld_workers.engine.base import OwnedRange

ELEMENT_BYTES = 4


@dataclass(frozen=True)
class Snapshot:
    """Ranges as of one moment, untouched by the steps that follow."""

    places: tuple[tuple[str, str, int, int], ...]
    """(tensor, kind, start, numel) of each range, in the order of the buffer."""
    buffer: memoryview
    """The ranges' fp32 values one after the other, as bytes."""


def share_bytes(ranges: Sequence[OwnedRange]) -> int:
    """What these ranges take in a snapshot."""
    return sum(owned.data.numel() for owned in ranges) * ELEMENT_BYTES


class SnapshotBuffer:
    """Host memory for snapshots: allocated once, used again by every save.

    Pinned where ranges lie on a CUDA device, so that copies run at the bus's speed.
    """

    def __init__(self, max_bytes: int | None) -> None:
        """Hold nothing yet; never more than ``max_bytes`` (None: whatever is asked for)."""
        self._max_numel = None if max_bytes is None else max(1, max_bytes // ELEMENT_BYTES)
        self._memory = torch.empty(0)

    def fits(self, ranges: Sequence[OwnedRange]) -> bool:
        """Whether one snapshot can hold these ranges."""
        numel = sum(owned.data.numel() for owned in ranges)
        return self._max_numel is None or numel <= self._max_numel

    def prepare(self, ranges: Sequence[OwnedRange]) -> None:
        """Have memory for these ranges, or as much as is allowed, and touch every page of it.

        A page is only there once it has been written to, which takes longer than the copy.
        """
        numel = sum(owned.data.numel() for owned in ranges)
        if self._max_numel is not None:
            numel = min(numel, self._max_numel)
        if self._memory.numel() < numel:
            pinned = any(owned.data.is_cuda for owned in ranges)
            # The old memory goes first: the two together could be more than there is.
            self._memory = torch.empty(0)
            self._memory = torch.empty(numel, dtype=torch.float32, pin_memory=pinned).zero_()

    def take(self, ranges: Sequence[OwnedRange]) -> Snapshot:
        """Copy the ranges. What an earlier snapshot held is overwritten.

        Raises:
            ValueError: they do not fit.
        """
        if not self.fits(ranges):
            raise ValueError(
                f"{share_bytes(ranges)} bytes do not fit a snapshot of at most "
                f"{(self._max_numel or 0) * ELEMENT_BYTES}; take them piece by piece"
            )
        self.prepare(ranges)
        lengths = [owned.data.numel() for owned in ranges]
        used = self._memory[: sum(lengths)]
        _copy(ranges, used.split(lengths) if lengths else ())
        places = tuple((r.tensor, r.kind, r.start, r.data.numel()) for r in ranges)
        return Snapshot(places, used.numpy().data.cast("B"))

    def pieces(self, ranges: Sequence[OwnedRange]) -> Iterator[list[OwnedRange]]:
        """The ranges, cut so that each piece fits one snapshot."""
        limit = self._max_numel or max(1, sum(owned.data.numel() for owned in ranges))
        piece: list[OwnedRange] = []
        left = limit
        for owned in ranges:
            position = 0
            while position < owned.data.numel():
                numel = min(left, owned.data.numel() - position)
                data = owned.data[position : position + numel]
                piece.append(replace(owned, start=owned.start + position, data=data))
                position += numel
                left -= numel
                if not left:
                    yield piece
                    piece, left = [], limit
        if piece:
            yield piece


def _copy(ranges: Sequence[OwnedRange], parts: Sequence[torch.Tensor]) -> None:
    """Copy to the host, and wait for that alone.

    On CUDA the copies run on a stream of their own, after what the ranges' writers have queued:
    what else is queued on the device, or comes meanwhile, is not waited for.
    """
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for owned, part in zip(ranges, parts, strict=True):
        if not owned.data.is_cuda:
            part.copy_(owned.data)
            continue
        device = owned.data.device
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
            streams[device].wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(streams[device]):
            part.copy_(owned.data, non_blocking=True)
    for stream in streams.values():
        stream.synchronize()


def _is_finite(chunk: memoryview) -> bool:
    """Whether all are numbers. The checksum has brought them to the cache: it costs little."""
    values = np.frombuffer(chunk, dtype=np.float32)
    with np.errstate(all="ignore"):
        if np.isfinite(values.sum()):
            return True
    # Large numbers may add up to infinity.
    return bool(np.isfinite(values).all())


class ChecksummedStream:
    """A snapshot's bytes in chunks, checksummed on their way out; none is copied.

    No chunk crosses the end of a range, so the checksums are those of the manifest.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        """Stream ``snapshot``; iterate once, then ask for ``stored``."""
        self._snapshot = snapshot
        self._ranges: list[StoredRange] = []

    def __iter__(self) -> Iterator[memoryview]:
        """The chunks in order.

        Raises:
            StateNotFinite: a chunk holds NaN or Inf: nobody could go on from there.
        """
        self._ranges.clear()
        offset = 0
        for tensor, kind, start, numel in self._snapshot.places:
            length = numel * ELEMENT_BYTES
            checksums = []
            for first in range(offset, offset + length, CHUNK_BYTES):
                chunk = self._snapshot.buffer[first : min(first + CHUNK_BYTES, offset + length)]
                checksums.append(crc32c(chunk))
                if not _is_finite(chunk):
                    raise StateNotFinite(f"{tensor} ({kind}) holds NaN or Inf")
                yield chunk
            self._ranges.append(
                StoredRange(tensor, kind, start, numel, offset, length, "float32", tuple(checksums))
            )
            offset += length

    def stored(self, key: str) -> StoredObject:
        """The object's entry for the manifest."""
        return StoredObject(key, len(self._snapshot.buffer), tuple(self._ranges))
