"""Host memory for what leaves the device, handed out again step after step.

A tensor lies in pieces: full ones of 16 MiB and a rest that is rounded up to a power of two. So
all tensors, whatever their shape, are served from few sizes; and torch, which rounds page-locked
allocations up to powers of two, wastes nothing on them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PIECE_BYTES = 16 * 1024 * 1024
_LEAST_BYTES = 512


class HostPool:
    """Pieces of host memory, page-locked or plain.

    It never holds more than was in use at one time: to make room for sizes that are new, free
    pieces of other sizes are dropped first.

    Attributes:
        used_bytes: in the hands of callers.
        held_bytes: in all.
    """

    def __init__(self, pinned: bool) -> None:
        """An empty pool; ``pinned`` pieces can be copied to and from a GPU while it computes."""
        self.pinned = pinned
        self.used_bytes = 0
        self.held_bytes = 0
        self._most_used = 0
        self._free: dict[int, list[Tensor]] = {}
        self._addresses: set[int] = set()

    def take(self, num_bytes: int) -> list[Tensor]:
        """Uint8 pieces that hold ``num_bytes`` together; the last may be larger than needed."""
        sizes = [PIECE_BYTES] * (num_bytes // PIECE_BYTES)
        if rest := num_bytes % PIECE_BYTES:
            sizes.append(max(_LEAST_BYTES, 1 << (rest - 1).bit_length()))
        return [self._take(size) for size in sizes]

    def give(self, pieces: list[Tensor]) -> None:
        """Take pieces back."""
        for piece in pieces:
            self.used_bytes -= piece.numel()
            self._free.setdefault(piece.numel(), []).append(piece)

    def holds(self, address: int) -> bool:
        """Whether a piece begins at this address."""
        return address in self._addresses

    def _take(self, size: int) -> Tensor:
        self.used_bytes += size
        self._most_used = max(self._most_used, self.used_bytes)
        if self._free.get(size):
            return self._free[size].pop()
        while self.held_bytes + size > self._most_used and self._drop():
            pass
        if self.pinned:
            piece = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            array = np.empty(size, np.uint8)
            # First: whoever counts tensors asks ``holds`` as soon as one is made.
            self._addresses.add(array.ctypes.data)
            piece = torch.from_numpy(array)
        self.held_bytes += size
        self._addresses.add(piece.data_ptr())
        return piece

    def _drop(self) -> bool:
        """Drop a free piece, if there is one."""
        for size, pieces in self._free.items():
            if pieces:
                self._addresses.discard(pieces.pop().data_ptr())
                self.held_bytes -= size
                return True
        return False
