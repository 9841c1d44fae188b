"""What a plan reckons with: GPUs by name, this machine, or the nodes of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ringworld_jobs.planner.cpu import Calibration, CalibrationError, cpu_device
from ringworld_jobs.planner.hardware import GPUS, Device, Hardware, gpu_named
from ringworld_jobs.spec import JobSpec
from ringworld_platform.errors import ClusterError, PlatformError

ASSUMED_GPU = "H100-80GB"
NVIDIA_FOLDER = Path("/proc/driver/nvidia/gpus")
_RAY_PREFIX = "accelerator_type:"


def hardware_of(spec: JobSpec) -> Callable[[], Hardware]:
    """This machine, as the job would use it; GPUs that it lacks are assumed where it wants them.

    Measuring a CPU begins now, and the function that comes back waits for its end.

    Args:
        spec: the job.
    """
    asked, workers = spec.resources.accelerator, spec.resources.workers.max
    local = local_gpus() if asked != "cpu" else None
    if local is not None:
        return lambda: local
    if asked == "gpu":
        assumed = Hardware(GPUS[ASSUMED_GPU], workers, "an assumption; say which: --gpus")
        return lambda: assumed
    threads = spec.resources.cpus_per_worker
    there = max(1, (os.cpu_count() or 1) // threads)
    calibration = Calibration.start(min(workers, there), threads)
    return lambda: Hardware(cpu_device(_measured(calibration), there), there, "this machine")


def local_gpus(folder: Path = NVIDIA_FOLDER) -> Hardware | None:
    """This machine's GPUs, as the driver names them; None where it has none that are known.

    Args:
        folder: of the driver.
    """
    try:
        texts = [(gpu / "information").read_text("utf-8") for gpu in sorted(folder.iterdir())]
    except OSError:
        return None
    models = [line.partition(":")[2] for text in texts for line in text.splitlines()[:1]]
    devices = [device for model in models if (device := gpu_named(model)) is not None]
    if not devices or len(devices) < len(models):
        return None
    slowest = min(devices, key=lambda device: (device.bf16_flops, device.memory_bytes))
    one_node = replace(slowest, devices_per_node=len(devices))
    return Hardware(one_node, len(devices), "this machine")


def cluster_hardware(spec: JobSpec, address: str | None) -> Hardware:
    """The nodes of a running cluster, with those that its autoscaler may add.

    Args:
        spec: the job; says what a worker takes of a node.
        address: of the cluster, see ``cluster.connect``.

    Raises:
        ClusterError: none answers, no node holds a worker, or Ray names no GPU that is known.
    """
    from ringworld_platform import cluster
    from ringworld_platform.capacity import cluster as capacity
    from ringworld_platform.capacity import has_gpus
    from ringworld_platform.room import Bundle, count

    info = cluster.connect(address)
    try:
        found, gpus = capacity(), has_gpus()
        kinds = _gpu_kinds()
    finally:
        cluster.disconnect()
    asked = spec.resources.accelerator
    on_gpu = asked == "gpu" or (asked == "auto" and gpus)
    bundle = Bundle(spec.resources.cpus_per_worker, int(on_gpu))
    rooms = [node.total for node in found.nodes.values()] + list((found.growth or {}).values())
    there = count(bundle, rooms)
    if not there:
        raise ClusterError(f"no node of the cluster at {info.address} holds {bundle.named(1)}")
    on_one = max(bundle.count_in(room) for room in rooms)
    origin = f"the cluster at {info.address}"
    if on_gpu:
        return Hardware(replace(_slowest(kinds), devices_per_node=on_one), there, origin)
    calibration = Calibration.start(on_one, bundle.cpus)
    device = cpu_device(_measured(calibration), on_one)
    return Hardware(device, there, f"{origin}, taken to be as fast as this machine")


def _gpu_kinds() -> list[str]:
    """Ray's names of the GPUs of all nodes: H100, A100-40G."""
    import ray

    return [
        name.removeprefix(_RAY_PREFIX)
        for node in ray.nodes()
        if node["Alive"]
        for name in node["Resources"]
        if name.startswith(_RAY_PREFIX)
    ]


def _slowest(kinds: list[str]) -> Device:
    devices = [device for kind in kinds if (device := gpu_named(kind)) is not None]
    if not devices:
        named = ", ".join(sorted(set(kinds))) or "none"
        raise ClusterError(
            f"the cluster's GPUs are named {named}, and known are {', '.join(GPUS)}; name the "
            "nearest with --gpus"
        )
    return min(devices, key=lambda device: (device.bf16_flops, device.memory_bytes))


def _measured(calibration: Calibration) -> float:
    try:
        return calibration.flops()
    except CalibrationError as error:
        raise PlatformError(str(error)) from error
