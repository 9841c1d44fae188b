"""How many bytes of tensors live at one time: what a GPU's allocator would report, on any device.

Storages are counted, so that views cost nothing, from the operator that returns them until they
are freed. What a kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts, while it is entered, the tensors that operators return; backward passes included.

    Attributes:
        live_bytes: of storages made inside and still there.
        peak_bytes: the most at one time since ``reset_peak``.
        largest_bytes: the largest single storage since ``reset_peak``.
    """

    def __init__(self, elsewhere: Callable[[int], bool] | None = None) -> None:
        """Count nothing yet.

        Args:
            elsewhere: says of a storage's address whether it lies in memory that is not counted.
        """
        super().__init__()
        self.live_bytes = self.peak_bytes = self.largest_bytes = 0
        self._elsewhere = elsewhere
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was there before, such as a parameter."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known or num_bytes == 0:
            return
        if self._elsewhere is not None and self._elsewhere(storage.data_ptr()):
            return

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            self._known.pop(key, None)
            self.live_bytes -= num_bytes

        self._known[key] = weakref.ref(storage, freed)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.largest_bytes = max(self.largest_bytes, num_bytes)

    def reset_peak(self) -> None:
        """Measure the peak anew, from what lives now."""
        self.peak_bytes, self.largest_bytes = self.live_bytes, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, count what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result
