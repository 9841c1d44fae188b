"""What the ranks of a ring send one another, and what that costs.

All of a group's ranks must post the same exchanges in the same order, from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.distributed as dist

_KEPT_EVENTS = 512


class _Clock:
    """Seconds between moments: of the host, or of a device's stream, which runs on its own."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        first.record(stream)
        yield
        last.record(stream)
        self._spans.append((first, last))
        if len(self._spans) > _KEPT_EVENTS:
            while self._spans and self._spans[0][1].query():
                self._settle()

    def read(self) -> float:
        while self._spans:
            self._settle()
        return self._seconds

    def _settle(self) -> None:
        first, last = self._spans.pop(0)
        last.synchronize()
        self._seconds += first.elapsed_time(last) / 1000


class RingStats:
    """Where a ring's time went, summed over calls until ``reset``.

    On CUDA the times are those of the stream that computes, measured by events; reading them waits
    for the work that they measure, and nothing else does.

    Attributes:
        bytes_sent: bytes that this rank sent.
        hops: exchanges that have ended.
        hop: of these, the ones of the round at hand.
        awaits: the rank (of the world) that the host waits for at this moment; on CUDA it waits
            for nobody, and hops end when they are queued.
    """

    def __init__(self) -> None:
        """Begin at zero."""
        self.bytes_sent = self.hops = self.hop = 0
        self.awaits: int | None = None
        self._compute, self._wait = _Clock(), _Clock()

    @property
    def compute_seconds(self) -> float:
        """Time in kernels and merging."""
        return self._compute.read()

    @property
    def wait_seconds(self) -> float:
        """Time waiting for other ranks that computation did not hide."""
        return self._wait.read()

    @contextmanager
    def computing(self, device: torch.device) -> Iterator[None]:
        """Add what happens inside, on ``device``, to ``compute_seconds``."""
        with self._compute.running(device):
            yield

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Add what happens inside, on ``device``, to ``wait_seconds``."""
        with self._wait.running(device):
            yield

    def reset(self) -> None:
        """Set every figure to zero, without waiting for anything."""
        self.bytes_sent = self.hops = self.hop = 0
        self._compute, self._wait = _Clock(), _Clock()


@dataclass(frozen=True)
class Members:
    """This rank's place among the ranks of one group.

    Attributes:
        rank: this rank within the group.
        size: number of ranks.
        group: the process group; None only at size 1.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    argument: ClassVar[str]
    """Name of the argument that the group came in."""
    kind: ClassVar[str]
    """What kind of group that is."""
    planned: ClassVar[str]
    """Name of the plan's field that says how many ranks it has."""

    @classmethod
    def over(cls, group: dist.ProcessGroup | None, size: int) -> Self:
        """Return this rank's place among all of ``group``.

        Raises:
            ValueError: the group is missing or has another size.
        """
        if group is None:
            if size != 1:
                raise ValueError(
                    f"plan.{cls.planned}={size} needs a {cls.kind} of {size} ranks; it is None"
                )
            return cls(0, 1, None)
        if dist.get_world_size(group) != size:
            raise ValueError(
                f"plan.{cls.planned}={size}, but the {cls.argument} has "
                f"{dist.get_world_size(group)} ranks; plan for its size"
            )
        return cls(dist.get_rank(group), size, group)


class Ring(Members):
    """This rank's place in a ring."""

    argument, kind, planned = "group", "process group", "ring_size"


class Message(IntEnum):
    """What a parcel carries. Posted in this order, so that two ranks pair them alike."""

    KEYS_VALUES = 1
    GRADIENTS = 2
    HOME = 3


class Parcel(NamedTuple):
    """One tensor on its way, seen from either end."""

    message: Message
    tensor: torch.Tensor
    """Contiguous; empty where nothing travels, and then nothing is posted."""
    peer: int
    """Ring rank, any integer modulo the ring's size."""


class Exchange:
    """What one rank sends and receives at one moment, while it computes.

    ``post`` hands all of a moment's parcels to the group at once and returns; ``finish`` waits for
    them. They are one batch because NCCL runs the operations of a group one after another, in the
    order in which each rank posts them: a lone send waits for its receiver, which may itself be
    waiting in a lone send. At most one batch is in flight. On CUDA the transfer runs on the group's
    own stream, after what the current stream holds at ``post``; ``finish`` makes the current stream
    wait, not the host.
    """

    def __init__(self, ring: Ring, stats: RingStats) -> None:
        """Prepare exchanges within ``ring``; figures go to ``stats``."""
        self._ring = ring
        self._stats = stats
        self._members = dist.get_process_group_ranks(ring.group) if ring.group else [0]
        self._posted: list[Parcel] | None = None
        self._works: list[dist.Work] = []
        stats.hop = 0

    def post(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        """Post parcels. None may be written, nor a received one read, until ``finish``.

        Args:
            sends: in the order of ``Message``.
            receives: in the order of ``Message``; each the size and dtype that its peer sends.

        Raises:
            RuntimeError: a batch is in flight already, or the ring has nobody to send to.
            ValueError: tensors that cannot be exchanged.
        """
        if self._posted is not None:
            raise RuntimeError("post() before finish() of the last")
        sends = [parcel for parcel in sends if parcel.tensor.numel()]
        receives = [parcel for parcel in receives if parcel.tensor.numel()]
        posted = [*sends, *receives]
        if posted and self._ring.size == 1:
            raise RuntimeError("a ring of one rank has nobody to send to")
        for parcel in posted:
            if not parcel.tensor.is_contiguous():
                raise ValueError(f"{parcel.message.name}: the tensor must be contiguous")
        sent = {parcel.tensor.data_ptr() for parcel in sends}
        for parcel in receives:
            if parcel.tensor.data_ptr() in sent:
                raise ValueError(f"{parcel.message.name}: memory is both sent and received into")
        # The tensors are kept with the works: their memory must outlive the transfer.
        self._posted = posted
        transfers = [self._transfer(dist.isend, parcel) for parcel in sends]
        transfers += [self._transfer(dist.irecv, parcel) for parcel in receives]
        self._works = dist.batch_isend_irecv(transfers) if transfers else []
        self._stats.bytes_sent += sum(parcel.tensor.nbytes for parcel in sends)

    def finish(self) -> None:
        """Wait for what was posted.

        Raises:
            RuntimeError: nothing was posted.
        """
        if self._posted is None:
            raise RuntimeError("finish() without post()")
        if self._works:
            # Sends come first: the last one is received, where anything is.
            self._stats.awaits = self._peer(self._posted[-1])
            with self._stats.waiting(self._posted[0].tensor.device):
                for work in self._works:
                    work.wait()
            self._stats.awaits = None
        self._stats.hops += 1
        self._stats.hop += 1
        self._posted, self._works = None, []

    def _transfer(self, operation: Callable[..., Any], parcel: Parcel) -> dist.P2POp:
        # NCCL pairs by order; gloo by tag.
        group, tag = self._ring.group, int(parcel.message)
        return dist.P2POp(operation, parcel.tensor, self._peer(parcel), group, tag)

    def _peer(self, parcel: Parcel) -> int:
        return self._members[parcel.peer % self._ring.size]
