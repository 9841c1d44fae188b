"""What a checkpoint weighs, how long it takes, and what of that training waits for."""

from __future__ import annotations

from dataclasses import dataclass

from ringworld_jobs.planner.hardware import GB, Device
from ringworld_jobs.planner.memory import checkpoint_bytes
from ringworld_jobs.planner.workload import Workload
from ringworld_jobs.spec import JobSpec

STORE_BANDWIDTH = {"file": 1.4 * GB, "s3": 2.0 * GB}
"""Bytes a second that one node writes and reads: of a disk that all share in the first case."""


@dataclass(frozen=True, slots=True)
class Saving:
    """Checkpoints of one stage.

    Attributes:
        num_bytes: of a whole checkpoint.
        stall_seconds: that training waits for each.
        save_seconds: until it is committed, in the background.
        load_seconds: to start from it.
        stall_per_step_seconds: the stall, over the steps between two checkpoints.
    """

    num_bytes: float
    stall_seconds: float
    save_seconds: float
    load_seconds: float
    stall_per_step_seconds: float


def saving(spec: JobSpec, work: Workload, device: Device, step_seconds: float) -> Saving:
    """Estimate a stage's checkpoints.

    Args:
        spec: the job.
        work: the stage's workload.
        device: what each worker runs on.
        step_seconds: of a step without them.
    """
    whole = checkpoint_bytes(work)
    share = whole / work.world_size
    stall = share / (device.host_bandwidth if device.is_cpu else device.bus_bandwidth)
    remote = spec.checkpoint.store.startswith("s3")
    nodes = -(-work.world_size // device.devices_per_node)
    bandwidth = STORE_BANDWIDTH["s3"] * nodes if remote else STORE_BANDWIDTH["file"]
    seconds = whole / bandwidth
    most = spec.checkpoint.max_host_bytes
    if most is not None and share > most:
        stall = seconds  # piece by piece, while the step waits
    every = spec.checkpoint.every
    steps = every.steps or (every.seconds or 0.0) / max(step_seconds, 1e-9)
    between = min(max(1.0, steps), float(work.stage.num_steps))
    return Saving(whole, stall, seconds, seconds, stall / between)
