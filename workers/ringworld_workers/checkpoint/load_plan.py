"""Which bytes of which objects a rank reads: few large requests, and whole checksummed chunks.

Pure arithmetic: no torch, no store.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    DamagedCheckpoint,
    StoredObject,
    StoredRange,
)
from ringworld_workers.checkpoint.manifest_checks import DTYPES

READ_BYTES = 16 * 1024 * 1024
"""Most bytes of one request: what a thread may hold besides the values' own place."""
GAP_BYTES = 256 * 1024
"""Unwanted bytes between two wanted ones that cost less to read than another request."""


@dataclass(frozen=True, slots=True)
class Want:
    """A run of elements that a rank needs."""

    tensor: str
    kind: str
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive whole chunks of a stored range, of which some bytes are wanted."""

    source: StoredRange
    low: int
    """First byte to read, from the range's begin: a multiple of CHUNK_BYTES."""
    high: int
    """Where the last chunk ends."""
    begin: int
    """First wanted byte, from the range's begin; low <= begin < end <= high."""
    end: int
    want: int
    """For which of the wants, by position."""
    target: int
    """Where in that want's bytes the byte at ``begin`` belongs."""

    @property
    def offset(self) -> int:
        """First byte to read in the object."""
        return self.source.offset + self.low

    @property
    def stop(self) -> int:
        """Byte of the object after the last one to read."""
        return self.source.offset + self.high


@dataclass(slots=True)
class Read:
    """One request: a run of an object's bytes, and what to do with them."""

    key: str
    segments: list[Segment] = field(default_factory=list)
    """In the object's order, apart from each other by at most GAP_BYTES."""

    @property
    def offset(self) -> int:
        """First byte in the object."""
        return self.segments[0].offset

    @property
    def stop(self) -> int:
        """Byte of the object after the last."""
        return self.segments[-1].stop


class RangeIndex:
    """A checkpoint's ranges by tensor and kind."""

    def __init__(self, objects: Iterable[StoredObject]) -> None:
        """Sort them by their first element."""
        self._ranges: dict[tuple[str, str], list[tuple[str, StoredRange]]] = defaultdict(list)
        for stored in objects:
            for found in stored.ranges:
                self._ranges[found.tensor, found.kind].append((stored.key, found))
        for ranges in self._ranges.values():
            ranges.sort(key=lambda entry: entry[1].start)

    def plan(self, wants: Sequence[Want], *, first: float = 0.0) -> list[Read]:
        """The reads that together give every wanted element once.

        Args:
            wants: what a rank needs.
            first: share of the reads, in the order of objects, to put last: ranks that begin at
                different places do not all ask for the same object at the same time.

        Raises:
            DamagedCheckpoint: an element is in no object.
        """
        by_key: dict[str, list[Segment]] = defaultdict(list)
        for number, want in enumerate(wants):
            for key, segment in self._segments(number, want):
                by_key[key].append(segment)
        reads = [read for key in sorted(by_key) for read in _coalesced(key, by_key[key])]
        turn = int(len(reads) * first)
        return reads[turn:] + reads[:turn]

    def _segments(self, number: int, want: Want) -> Iterator[tuple[str, Segment]]:
        position, stop = want.start, want.start + want.numel
        for key, source in self._ranges.get((want.tensor, want.kind), ()):
            if source.start + source.numel <= position:
                continue
            if position >= stop or source.start > position:
                break
            end = min(stop, source.start + source.numel)
            width = DTYPES[source.dtype]
            begin_byte, end_byte = (position - source.start) * width, (end - source.start) * width
            target = (position - want.start) * width
            for cut in _cuts(source, begin_byte, end_byte):
                yield key, Segment(source, *cut, number, target + cut[2] - begin_byte)
            position = end
        if position < stop:
            raise DamagedCheckpoint(
                f"no object holds elements {position} to {stop} of {want.kind} of {want.tensor}"
            )


def _cuts(source: StoredRange, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(low, high, begin, end) of pieces that one request can hold."""
    low = begin - begin % CHUNK_BYTES
    while low < end:
        high = min(low + READ_BYTES, -(-end // CHUNK_BYTES) * CHUNK_BYTES, source.length_bytes)
        yield low, high, max(begin, low), min(end, high)
        low = high


def _coalesced(key: str, segments: list[Segment]) -> Iterator[Read]:
    segments.sort(key=lambda segment: segment.offset)
    read = Read(key)
    for segment in segments:
        if read.segments:
            gap = segment.offset - read.stop
            if not 0 <= gap <= GAP_BYTES or segment.stop - read.offset > READ_BYTES:
                yield read
                read = Read(key)
        read.segments.append(segment)
    if read.segments:
        yield read
