"""What workers run on, in the numbers that an estimate needs. docs/planner.md names the sources."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from ringworld_jobs.problem import nearest

GIB = 2**30
GB = 10**9
TERA = 10**12

Precision = Literal["fp32", "bf16"]


class HardwareError(ValueError):
    """Hardware that is not in the table, or is written in another way than ``64xH100-80GB``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One worker's device, and its share of the node.

    Rates are nominal peaks; an efficiency is the share of it that real kernels reach.

    Attributes:
        name: as ``--gpus`` takes it; ``CPU`` for a process on CPU cores.
        memory_bytes: what a program can have of it.
        bf16_flops: dense matrix peak in bf16, per second.
        fp32_flops: likewise in fp32, without TF32, which torch leaves off.
        memory_bandwidth: bytes a second.
        matmul_efficiency: share of the peak in a layer's matrix products.
        forward_efficiency: share of the peak in the attention kernel's forward pass.
        backward_efficiency: likewise in its backward pass.
        link_bandwidth: bytes a second and direction to another device of the node.
        network_bandwidth: bytes a second and direction to another node, this device's share.
        bus_bandwidth: bytes a second and direction to host memory.
        host_bandwidth: bytes a second that the host's cores read and write for this device.
        host_bytes: host memory, this device's share.
        devices_per_node: workers of a whole node.
        process_bytes: host memory of a worker before it holds a model.
        context_bytes: device memory that the driver and the communication take.
        layer_seconds: the least that a layer takes, forward and backward, however few its tokens.
        reserve_share: what the allocator holds unused, of what comes and goes in a step.
        overlaps: transfers run beside the computation.
        unmeasured: what of this is neither in a data sheet nor measured.
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    matmul_efficiency: float
    forward_efficiency: float
    backward_efficiency: float
    link_bandwidth: float
    network_bandwidth: float
    bus_bandwidth: float
    host_bandwidth: float
    host_bytes: float
    devices_per_node: int = 8
    process_bytes: float = 3.0 * GIB
    context_bytes: float = 1.2 * GIB
    layer_seconds: float = 0.4e-3
    reserve_share: float = 0.06
    overlaps: bool = True
    unmeasured: str = ""

    @property
    def is_cpu(self) -> bool:
        """Whether device memory is host memory."""
        return self.name == "CPU"

    def peak(self, precision: Precision) -> float:
        """Peak of matrix products, per second."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices that a job may use.

    Attributes:
        device: each of them.
        count: how many there are.
        origin: where the number comes from, in words: ``--gpus``, ``this machine``.
    """

    device: Device
    count: int
    origin: str

    @property
    def num_nodes(self) -> int:
        """Nodes that hold them."""
        return -(-self.count // self.device.devices_per_node)

    def __str__(self) -> str:
        """``64 x H100-80GB, 8 a node``."""
        per_node = min(self.count, self.device.devices_per_node)
        if self.device.is_cpu:
            return f"{self.count} CPU worker{'s' * (self.count > 1)} on {self.origin}"
        return f"{self.count} x {self.device.name}, {per_node} a node"

    def grown(self, count: int) -> Hardware:
        """The same with another number of devices."""
        return replace(self, count=count)


def _gpu(
    name: str,
    gib: float,
    bf16: float,
    fp32: float,
    memory: float,
    efficiency: tuple[float, float, float],
    link: float,
    network: float,
    bus: float,
    host_gib: float,
    *,
    unmeasured: str = "efficiencies",
) -> Device:
    return Device(
        name=name,
        memory_bytes=gib * GIB,
        bf16_flops=bf16 * TERA,
        fp32_flops=fp32 * TERA,
        memory_bandwidth=memory * TERA,
        matmul_efficiency=efficiency[0],
        forward_efficiency=efficiency[1],
        backward_efficiency=efficiency[2],
        link_bandwidth=link * GB,
        network_bandwidth=network * GB,
        bus_bandwidth=bus * GB,
        host_bandwidth=20 * GB,
        host_bytes=host_gib * GIB,
        unmeasured=unmeasured,
    )


# Attention efficiencies are those of the FlashAttention-2 kernel that torch has built in.
GPUS: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("A100-40GB", 39.4, 312, 19.5, 1.555, (0.75, 0.62, 0.52), 300, 25, 25, 128),
        _gpu("A100-80GB", 79.1, 312, 19.5, 2.039, (0.75, 0.62, 0.52), 300, 25, 25, 128),
        _gpu("H100-80GB", 79.1, 989, 67.0, 3.35, (0.68, 0.38, 0.30), 450, 50, 50, 256),
        _gpu("H200-141GB", 139.8, 989, 67.0, 4.8, (0.70, 0.38, 0.30), 450, 50, 50, 256),
        _gpu("B200-180GB", 178.0, 2250, 75.0, 7.7, (0.65, 0.20, 0.15), 900, 50, 50, 256),
        _gpu("L40S-48GB", 44.4, 362, 91.6, 0.864, (0.60, 0.55, 0.45), 25, 6.25, 25, 192),
    )
}
_ALIASES = {name.partition("-")[0]: name for name in GPUS} | {"A100": "A100-80GB"}
_WRITTEN = re.compile(r"\s*(?:(\d+)\s*[x*]\s*)?([A-Za-z][\w-]*)\s*")
_TURNED = re.compile(r"([A-Za-z][\w-]*)x(\d+)")


def parse_gpus(text: str) -> Hardware:
    """Read ``64xH100-80GB``; ``H100`` alone is one of them.

    Raises:
        HardwareError: another form, none at all, or a GPU that is not in the table; says which are,
            and which was probably meant.
    """
    match = _WRITTEN.fullmatch(text)
    known = ", ".join(GPUS)
    if match is None:
        raise HardwareError(
            f"{text!r}: write a number and a GPU, such as 64xH100-80GB; known are {known}"
        )
    count, name = int(match[1] or 1), match[2]
    by_lower = {key.lower(): GPUS[value] for key, value in _ALIASES.items()}
    by_lower |= {key.lower(): device for key, device in GPUS.items()}
    device = by_lower.get(name.lower())
    if device is None:
        if turned := _TURNED.fullmatch(name):
            name, count = turned[1], int(turned[2])
        meant = nearest(name, GPUS) or nearest(name, _ALIASES)
        meant = _ALIASES.get(meant, meant)
        hint = f"; did you mean {count}x{meant}?" if meant else ""
        raise HardwareError(f"{text!r}: no GPU {name!r} is known, only {known}{hint}")
    if count < 1:
        raise HardwareError(f"{text!r}: at least 1 GPU is needed; write 8x{device.name}")
    return Hardware(device, count, "--gpus")


def gpu_named(name: str, memory_bytes: float | None = None) -> Device | None:
    """The table's entry for a GPU as CUDA or Ray names it; None where there is none.

    Args:
        name: ``NVIDIA H100 80GB HBM3``, or Ray's ``H100``, ``A100-40G``.
        memory_bytes: tells two sizes of one GPU apart.
    """
    found = [d for d in GPUS.values() if d.name.partition("-")[0].lower() in name.lower()]
    if not found:
        return None
    if memory_bytes:
        return min(found, key=lambda device: abs(device.memory_bytes - memory_bytes))
    for device in found:
        if device.name.partition("-")[2].removesuffix("B").lower() in name.lower():
            return device
    return found[-1]
