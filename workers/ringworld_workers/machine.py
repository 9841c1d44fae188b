"""What this rank computes on, as a prediction of its stage needs to know."""

from __future__ import annotations

import time
from typing import Any

import torch

MATMUL_SIZE = 256
MATMUL_SECONDS = 0.06


def machine_record(device: torch.device) -> dict[str, Any]:
    """The device's name, and what of it the name does not tell.

    Args:
        device: this rank's.

    Returns:
        ``device_name``; of a GPU ``device_total_bytes``, of a CPU ``matmul_flops``, the rate of
        fp32 matrix products on the threads that this process has, per second.
    """
    if device.type == "cuda":
        return {
            "device_name": torch.cuda.get_device_name(device),
            "device_total_bytes": torch.cuda.get_device_properties(device).total_memory,
        }
    return {"device_name": "CPU", "matmul_flops": matmul_flops()}


def matmul_flops() -> float:
    """Median rate of this process's product of two fp32 matrices of 256 x 256, FLOPs a second."""
    matrix = torch.rand(MATMUL_SIZE, MATMUL_SIZE, generator=torch.Generator().manual_seed(0))
    matrix @ matrix
    rates: list[float] = []
    end = time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < end or not rates:
        began = time.perf_counter()
        matrix @ matrix
        rates.append(2.0 * MATMUL_SIZE**3 / (time.perf_counter() - began))
    return sorted(rates)[len(rates) // 2]
