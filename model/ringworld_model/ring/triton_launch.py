"""How the Triton kernels are launched: tiles, warps and stages, by device; and where they run."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How one kernel is launched.

    Attributes:
        tile_q: queries of a tile.
        tile_k: keys of a tile.
        warps: warps of a program.
        stages: stages of the pipelined loads.
    """

    tile_q: int
    tile_k: int
    warps: int
    stages: int


class Launches(NamedTuple):
    """How the three kernels are launched."""

    forward: Launch
    keys: Launch
    queries: Launch


# By D (64 or 128, the next that is enough) and whether inputs are half types. Chosen by what the
# compiler makes of them: products by warp groups where there are some, shared memory under 99 KiB
# where devices may have no more, and no or few spilled registers in the loop over whole tiles.
_HOPPER = {
    (64, True): Launches(Launch(128, 128, 8, 3), Launch(64, 128, 8, 3), Launch(128, 64, 8, 3)),
    (128, True): Launches(Launch(128, 128, 8, 2), Launch(64, 128, 8, 2), Launch(128, 64, 8, 2)),
    (64, False): Launches(Launch(64, 32, 4, 2), Launch(32, 64, 4, 2), Launch(64, 32, 4, 2)),
    (128, False): Launches(Launch(128, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
}
_AMPERE = {
    (64, True): Launches(Launch(128, 64, 4, 2), Launch(32, 64, 4, 2), Launch(128, 32, 4, 2)),
    (128, True): Launches(Launch(128, 32, 8, 3), Launch(32, 64, 4, 2), Launch(128, 32, 8, 2)),
    (64, False): Launches(Launch(32, 32, 4, 2), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)),
    (128, False): Launches(Launch(32, 32, 4, 1), Launch(16, 32, 8, 1), Launch(32, 16, 8, 1)),
}


def block_width(head_dim: int) -> int:
    """Columns of the kernels' tiles: ``head_dim`` rounded up to a power of two, from 32."""
    return max(32, 1 << (head_dim - 1).bit_length())


def launches(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launches:
    """Return how the kernels are launched.

    Args:
        head_dim: 1 to 128.
        dtype: bf16, fp16 or fp32.
        capability: the device's compute capability.
    """
    # 9.x and 10.x are the data centre's; 12.x has Ampere's instructions and little shared memory.
    # On 10.x Triton 3.6 makes an empty kernel of fp32's large tiles.
    half = dtype.itemsize == 2
    table = _HOPPER if capability[0] == 9 or (capability[0] == 10 and half) else _AMPERE
    return table[max(64, block_width(head_dim)), half]


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; the interpreter works as Hopper does."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def triton_missing(device: torch.device) -> str | None:
    """Say why the kernels cannot run on ``device``; None where they can.

    On a CPU they run where Triton interprets (TRITON_INTERPRET=1 before its import), for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        from triton.runtime.interpreter import InterpretedFunction

        from ringworld_model.ring.triton_forward import attend_forward

        interpreted = isinstance(attend_forward, InterpretedFunction)
        return None if interpreted else "the device is a cpu"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"no kernel for device {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"
