"""Reads parts of logical tensors out of a checkpoint's objects: parallel, verified, in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from awscrt.checksums import crc32c

from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    CheckpointError,
    DamagedCheckpoint,
    Manifest,
)
from ringworld_workers.checkpoint.load_plan import GAP_BYTES, READ_BYTES, RangeIndex, Read, Want
from ringworld_workers.checkpoint.manifest_checks import DTYPES
from ringworld_workers.engine.base import OwnedRange
from ringworld_workers.store.base import NotFound, Store, StoreError

READS_AT_ONCE = 8


class RangeReader:
    """Fills ranges from whichever objects hold their elements.

    Values go from the store straight to their place in host memory, or through a pinned buffer a
    thread to a GPU's. Besides, each of READS_AT_ONCE threads holds at most READ_BYTES.
    """

    def __init__(self, store: Store, manifest: Manifest, *, first: float = 0.0) -> None:
        """Index the manifest's ranges; nothing is read yet.

        Args:
            store: that holds the objects.
            manifest: of the checkpoint.
            first: see ``RangeIndex.plan``.
        """
        self._store, self._first = store, first
        self._sizes = {stored.key: stored.size for stored in manifest.objects}
        self._index = RangeIndex(manifest.objects)
        self._local = threading.local()

    def read_into(self, wanted: OwnedRange) -> None:
        """Fill one range; see ``read``."""
        self.read([wanted])

    def read(self, wanted: Sequence[OwnedRange], beat: Callable[[], None] = lambda: None) -> None:
        """Fill every range. When it raises, what they hold is undefined.

        Args:
            wanted: the ranges; they do not overlap in memory.
            beat: called now and then, on the calling thread, while reads succeed.

        Raises:
            DamagedCheckpoint: an element is in no object, or an object is missing, truncated, or
                unlike its checksums even when it is read once more; names object and bytes.
            CheckpointError: the store refuses to give an object.
            StoreError: the store does not answer; a later try may succeed.
        """
        wants = [Want(w.tensor, w.kind, w.start, w.data.numel()) for w in wanted]
        reads = self._index.plan(wants, first=self._first)
        if len(reads) < 2:
            for read in reads:
                self._run(read, wanted)
            return
        with ThreadPoolExecutor(min(READS_AT_ONCE, len(reads)), "checkpoint-read") as pool:
            try:
                for done in as_completed([pool.submit(self._run, read, wanted) for read in reads]):
                    done.result()
                    beat()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, read: Read, wanted: Sequence[OwnedRange]) -> None:
        """Fetch, verify, and send on to a GPU what belongs there."""
        landing = _Landing(read, wanted, self._local)
        for last in (False, True):
            self._fetch(read, landing)
            bad = landing.bad_bytes()
            if bad is None:
                return landing.deliver()
            # Once it may have been the network or this machine's memory; twice it is the object.
            if last:
                raise DamagedCheckpoint(f"object {read.key} is damaged: the checksum of {bad}")
        return None

    def _fetch(self, read: Read, landing: _Landing) -> None:
        try:
            self._store.read_into(read.key, read.offset, landing.buffers)
        except StoreError as error:
            raise self._judged(error, read) from error

    def _judged(self, error: StoreError, read: Read) -> Exception:
        """Whether the object is at fault, the store's answer is final, or a later try may help."""
        source = read.segments[0].source
        others = len(read.segments) - 1
        held = f"bytes {read.offset} to {read.stop} ({source.kind} of {source.tensor}"
        held += f" and {others} more)" if others else ")"
        expected = self._sizes[read.key]
        try:
            found = self._size(read.key)
        except StoreError:
            found = expected  # nothing is known against it
        # What is in the listing is there, even if something on the way says otherwise.
        if isinstance(error, NotFound) and found is None:
            return DamagedCheckpoint(f"object {read.key} is missing: {held}; {error}")
        if found is not None and found < expected:
            return DamagedCheckpoint(
                f"object {read.key} is truncated: it has {found} of {expected} bytes; {held} were "
                "to be read"
            )
        if error.transient:
            return error
        return CheckpointError(f"object {read.key} cannot be read: {held}; {error}")

    def _size(self, key: str) -> int | None:
        """Of the object as it lies in the store; None where it does not."""
        found = {info.key: info.size for info in self._store.list(key.rpartition("/")[0])}
        return found.get(key)


class _Landing:
    """The host memory that one read fills."""

    def __init__(self, read: Read, wanted: Sequence[OwnedRange], local: threading.local) -> None:
        """Lay out the buffers.

        Args:
            read: what is read.
            wanted: the ranges whose parts it fills.
            local: of the thread; keeps its buffer for the next read.
        """
        self.buffers: list[memoryview] = []
        """The run's bytes, one after the other."""
        self._read = read
        self._pieces: list[list[memoryview]] = []
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        position, used, gap = read.offset, 0, None
        for segment in read.segments:
            if segment.offset > position:
                # What nobody wants may land on top of each other.
                gap = _bytes(GAP_BYTES) if gap is None else gap
                self.buffers.append(gap[: segment.offset - position])
            width = DTYPES[segment.source.dtype]
            first, count = segment.target // width, (segment.end - segment.begin) // width
            target = wanted[segment.want].data[first : first + count]
            head, size = segment.begin - segment.low, segment.high - segment.low
            if _is_in_place(target):
                inside = target.numpy().data.cast("B")
                edges = _bytes(size - len(inside))
                pieces = [edges[:head], inside, edges[head:]]
            else:
                part = _slab(local, target.is_cuda)[used : used + size]
                used += size
                pieces = [part.numpy().data]
                values = part[head : head + count * width].view(torch.float32)
                self._staged.append((target, values))
            self._pieces.append([piece for piece in pieces if len(piece)])
            self.buffers += self._pieces[-1]
            position = segment.stop

    def bad_bytes(self) -> str | None:
        """The first bytes that are unlike their checksum, in words."""
        for segment, pieces in zip(self._read.segments, self._pieces, strict=True):
            for first in range(segment.low, segment.high, CHUNK_BYTES):
                end = min(first + CHUNK_BYTES, segment.high)
                found = 0
                for part in _between(pieces, first - segment.low, end - segment.low):
                    found = crc32c(part, found)
                if found != segment.source.crc32c[first // CHUNK_BYTES]:
                    source = segment.source
                    return (
                        f"bytes {source.offset + first} to {source.offset + end} ({source.kind} of "
                        f"{source.tensor}) is wrong"
                    )
        return None

    def deliver(self) -> None:
        """Copy what was verified, and is not in its place yet."""
        for target, values in self._staged:
            target.copy_(values)


def _is_in_place(target: torch.Tensor) -> bool:
    return not target.is_cuda and target.dtype == torch.float32 and target.is_contiguous()


def _slab(local: threading.local, pinned: bool) -> torch.Tensor:
    """The thread's own READ_BYTES, made once."""
    name = "pinned" if pinned else "plain"
    if not hasattr(local, name):
        setattr(local, name, torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=pinned))
    found: torch.Tensor = getattr(local, name)
    return found


def _bytes(size: int) -> memoryview:
    """Host memory that nobody has written to."""
    return torch.empty(size, dtype=torch.uint8).numpy().data


def _between(pieces: Sequence[memoryview], begin: int, end: int) -> Iterator[memoryview]:
    """The parts of consecutive pieces that hold these of their bytes."""
    position = 0
    for piece in pieces:
        low, high = max(begin - position, 0), min(end - position, len(piece))
        if low < high:
            yield piece[low:high]
        position += len(piece)
