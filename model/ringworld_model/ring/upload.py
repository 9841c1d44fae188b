"""Copying what the host has worked out to a device, without waiting for the device."""

from __future__ import annotations

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU tensor's copy on ``device``; the tensor itself where that is the CPU.

    A plain copy to a CUDA device waits until the device has done all that was asked of it before;
    one from pinned memory takes its turn like a kernel.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
