"""Activation offload: what checkpointing keeps waits in host memory for the backward pass.

While a layer is computed, the tensors that it keeps are copied out on a stream of their own; the
device's copies are dropped one layer later. The backward pass asks for a layer's tensors; they come
back one layer ahead of it, while the layer above is differentiated. The last layer's stay where
they are, for the backward pass begins with them.

On a CPU the same code copies at once, from host memory to host memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ringworld_model.host_pool import HostPool

_Key = tuple[int, int, torch.Size, tuple[int, ...]]


class ActivationOffload:
    """Moves what the layers of one model keep; host memory and stream are used by every pass."""

    def __init__(self) -> None:
        """Nothing is allocated before the first pass."""
        self._lane: _Lane | None = None

    @property
    def pool(self) -> HostPool | None:
        """The host memory; None before the first pass."""
        return self._lane.pool if self._lane else None

    def forward_pass(
        self, device: torch.device, num_layers: int, resident: Iterable[Tensor]
    ) -> ForwardPass:
        """Begin a forward pass.

        Args:
            device: where the layers compute.
            num_layers: how often ``ForwardPass.layer`` will be entered.
            resident: tensors that every layer keeps (the rotary tables): they stay.
        """
        if self._lane is None or self._lane.device != device:
            self._lane = _Lane(device)
        return ForwardPass(self._lane, num_layers, resident)


class ForwardPass:
    """The layers of one forward pass, in their order."""

    def __init__(self, lane: _Lane, num_layers: int, resident: Iterable[Tensor]) -> None:
        """See ``ActivationOffload.forward_pass``."""
        self._lane = lane
        self._left = num_layers
        self._resident = {_key(tensor) for tensor in resident}
        self._last: _Layer | None = None

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Send out what autograd saves inside; the last layer's stays."""
        self._left -= 1
        layer = _Layer(self._lane, self._resident, self._last, stays=self._left == 0)
        with saved_tensors_hooks(layer.pack, _unpack):
            yield
        layer.sent = self._lane.mark()
        if self._last is not None:
            self._last.let_go()
        self._last = layer


class _Lane:
    """The way to the host and back: a side stream on CUDA, plain copies elsewhere.

    All copies run on one stream, so that a piece of host memory is never written while an earlier
    copy still reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = HostPool(pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copying(self) -> AbstractContextManager[Any]:
        """Copies made inside wait for the computation so far, and later computation not for them.

        The caller keeps both ends alive until ``wait``.
        """
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """The copies so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let later computation wait for marked copies."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)


class _Kept:
    """One tensor that autograd saved. It lives as long as the graph holds it."""

    def __init__(self, layer: _Layer, tensor: Tensor) -> None:
        self.layer = layer
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.back: Tensor | None = None
        self.pieces: list[Tensor] = []
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        self.pieces = layer.lane.pool.take(flat.numel())
        with layer.lane.copying():
            for piece, part in zip(self.pieces, _split(flat, self.pieces), strict=True):
                piece[: part.numel()].copy_(part, non_blocking=True)
        self.source: Tensor | None = flat
        """What is copied, until the copy is done."""

    def fetch(self) -> None:
        """Begin to copy it back, into memory of the stream that computes."""
        self.back = torch.empty(self.shape, dtype=self.dtype, device=self.layer.lane.device)
        flat = self.back.view(-1).view(torch.uint8)
        with self.layer.lane.copying():
            for piece, part in zip(self.pieces, _split(flat, self.pieces), strict=True):
                part.copy_(piece[: part.numel()], non_blocking=True)

    def __del__(self) -> None:
        """Give the host memory back: the graph has no more use for it."""
        # A copy that nobody waited for must not land in memory that computes something else.
        self.layer.lane.wait(self.layer.fetched)
        self.layer.lane.pool.give(self.pieces)


@dataclass(frozen=True, slots=True)
class _Stays:
    """A tensor of the last layer, where it was."""

    layer: _Layer
    back: Tensor


class _Layer:
    """What one layer keeps."""

    def __init__(
        self, lane: _Lane, resident: set[_Key], previous: _Layer | None, stays: bool
    ) -> None:
        self.lane, self.previous, self.stays = lane, previous, stays
        self.sent: torch.cuda.Event | None = None
        self.fetched: torch.cuda.Event | None = None
        self._resident = resident
        self._kept: list[weakref.ref[_Kept]] = []
        self._seen: dict[_Key, tuple[_Kept, Tensor]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Kept | _Stays:
        """Send a tensor out, once however often it is saved."""
        if self.stays:
            return _Stays(self, tensor.detach())
        key = _key(tensor)
        if not tensor.is_floating_point() or tensor.numel() == 0 or key in self._resident:
            return tensor
        if key not in self._seen:
            kept = _Kept(self, tensor)
            self._kept.append(weakref.ref(kept))
            # Its memory is held too: another tensor must not get the address meanwhile.
            self._seen[key] = kept, tensor.detach()
        return self._seen[key][0]

    def let_go(self) -> None:
        """Drop the device's copies; the computation waits until they have left."""
        self.lane.wait(self.sent)
        for kept, _ in self._seen.values():
            kept.source = None
        self._seen.clear()

    def fetch(self) -> None:
        """Begin to bring back what is not back yet."""
        away = [kept for ref in self._kept if (kept := ref()) is not None and kept.back is None]
        for kept in away:
            kept.fetch()
        if away:
            self.fetched = self.lane.mark()


def _unpack(kept: Tensor | _Kept | _Stays) -> Tensor:
    """A saved tensor's value, on the device. The layer below is sent for as well."""
    if isinstance(kept, Tensor):
        return kept
    layer = kept.layer
    layer.fetch()
    layer.lane.wait(layer.fetched)
    if layer.previous is not None:
        layer.previous.fetch()
    assert kept.back is not None
    return kept.back


def _key(tensor: Tensor) -> _Key:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), int(tensor.storage_offset()), tensor.shape, tensor.stride()


def _split(flat: Tensor, pieces: list[Tensor]) -> Iterator[Tensor]:
    """``flat`` cut as the pieces hold it."""
    start = 0
    for piece in pieces:
        yield flat[start : start + piece.numel()]
        start += piece.numel()
