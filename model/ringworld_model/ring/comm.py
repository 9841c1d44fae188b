"""Rotation: a tensor moves one rank around the ring while the rank computes.

All of a group's ranks must start the same rotations in the same order, from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class RingStats:
    """Where a ring's time went, summed over calls until ``reset``.

    On CPU these are exact; on a device that runs asynchronously they are the host's view.

    Attributes:
        compute_seconds: time in block kernels and merging.
        wait_seconds: time waiting for a transfer that computation did not hide.
        bytes_sent: bytes that this rank sent.
    """

    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    bytes_sent: int = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Add the time inside to ``compute_seconds``."""
        began = time.perf_counter()
        yield
        self.compute_seconds += time.perf_counter() - began

    def reset(self) -> None:
        """Set every figure to zero."""
        self.compute_seconds, self.wait_seconds, self.bytes_sent = 0.0, 0.0, 0


class Message(IntEnum):
    """What a transfer carries; the tag keeps two kinds in flight apart."""

    KEYS_VALUES = 1
    GRADIENTS = 2
    HOME = 3


@dataclass(frozen=True)
class Ring:
    """This rank's place in a ring.

    Attributes:
        rank: this rank within the group.
        size: number of ranks.
        group: the process group; None only at size 1.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def over(cls, group: dist.ProcessGroup | None, size: int) -> Ring:
        """Return this rank's place in a ring of all of ``group``.

        Raises:
            ValueError: the group is missing or has another size.
        """
        if group is None:
            if size != 1:
                raise ValueError(
                    f"plan.ring_size={size} needs a process group of {size} ranks; group is None"
                )
            return cls(0, 1, None)
        if dist.get_world_size(group) != size:
            raise ValueError(
                f"plan.ring_size={size}, but the group has {dist.get_world_size(group)} ranks; "
                "plan for the group's size"
            )
        return cls(dist.get_rank(group), size, group)


class Rotation:
    """Sends one tensor to the next rank while receiving one from the previous.

    ``start`` posts both transfers and returns at once; ``finish`` waits for them. At most one
    transfer of a rotation is in flight.
    """

    def __init__(self, ring: Ring, message: Message, stats: RingStats) -> None:
        """Prepare a rotation of ``message`` tensors; figures go to ``stats``."""
        self._ring = ring
        self._message = message
        self._stats = stats
        self._works: list[dist.Work] = []
        if ring.size > 1:
            members = dist.get_process_group_ranks(ring.group)
            self._next = members[(ring.rank + 1) % ring.size]
            self._previous = members[(ring.rank - 1) % ring.size]
        self._in_flight: tuple[torch.Tensor, torch.Tensor] | None = None

    def start(self, send: torch.Tensor, receive: torch.Tensor) -> None:
        """Post the transfer. Neither tensor may be written, nor ``receive`` read, until ``finish``.

        Args:
            send: contiguous, any shape; empty where there is nothing to send.
            receive: contiguous, the shape that the previous rank sends, the same dtype, other
                memory; empty where that rank sends nothing.

        Raises:
            RuntimeError: a transfer is in flight already, or the ring has one rank only.
            ValueError: tensors that cannot be exchanged.
        """
        if self._in_flight is not None:
            raise RuntimeError(f"{self._message.name}: start() before finish() of the last")
        if self._ring.size == 1:
            raise RuntimeError(f"{self._message.name}: a ring of one rank has nobody to send to")
        if send.dtype != receive.dtype:
            raise ValueError(
                f"{self._message.name}: send is {send.dtype}, receive is {receive.dtype}"
            )
        if not (send.is_contiguous() and receive.is_contiguous()):
            raise ValueError(f"{self._message.name}: both tensors must be contiguous")
        if send.numel() and send.data_ptr() == receive.data_ptr():
            raise ValueError(f"{self._message.name}: send and receive are the same memory")
        group, tag = self._ring.group, int(self._message)
        transfers = []
        if send.numel():
            transfers.append(dist.P2POp(dist.isend, send, self._next, group, tag))
        if receive.numel():
            transfers.append(dist.P2POp(dist.irecv, receive, self._previous, group, tag))
        self._works = dist.batch_isend_irecv(transfers) if transfers else []
        self._in_flight = (send, receive)
        self._stats.bytes_sent += send.numel() * send.element_size()

    def finish(self) -> torch.Tensor:
        """Wait for the transfer; return the received tensor. ``send`` may be written again.

        Raises:
            RuntimeError: nothing is in flight.
        """
        if self._in_flight is None:
            raise RuntimeError(f"{self._message.name}: finish() without start()")
        began = time.perf_counter()
        for work in self._works:
            work.wait()
        self._stats.wait_seconds += time.perf_counter() - began
        received = self._in_flight[1]
        self._works, self._in_flight = [], None
        return received


class Mail:
    """Sends tensors straight to any rank of the ring, and gathers those that other ranks send."""

    def __init__(self, ring: Ring, stats: RingStats) -> None:
        """Prepare an empty mail; figures go to ``stats``."""
        self._group = ring.group
        self._members = dist.get_process_group_ranks(ring.group) if ring.group else []
        self._stats = stats
        self._posted: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Post a contiguous tensor to ring rank ``to``; empty: nothing. Do not write to it."""
        if tensor.numel():
            self._post(dist.isend, tensor, to)
            self._stats.bytes_sent += tensor.numel() * tensor.element_size()

    def receive(self, tensor: torch.Tensor, sender: int) -> None:
        """Let what ring rank ``sender`` sends arrive in ``tensor``; empty: nothing is expected."""
        if tensor.numel():
            self._post(dist.irecv, tensor, sender)

    def finish(self) -> None:
        """Wait until all that was posted has arrived."""
        began = time.perf_counter()
        for work, _ in self._posted:
            work.wait()
        self._posted = []
        self._stats.wait_seconds += time.perf_counter() - began

    def _post(self, operation: Callable[..., Any], tensor: torch.Tensor, peer: int) -> None:
        transfer = dist.P2POp(
            operation, tensor, self._members[peer], self._group, int(Message.HOME)
        )
        # The tensor is kept with the work: its memory must outlive the transfer.
        self._posted.extend((work, tensor) for work in dist.batch_isend_irecv([transfer]))
