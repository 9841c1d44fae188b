"""A stage, and a job, on given hardware: everything that a plan shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ringworld_jobs.mesh import MeshError, MeshSize, resolve_mesh, shrink_mesh
from ringworld_jobs.planner.hardware import Device, Hardware
from ringworld_jobs.planner.memory import Memory, memory_of
from ringworld_jobs.planner.mesh_reason import mesh_reason
from ringworld_jobs.planner.saving import Saving, saving
from ringworld_jobs.planner.step_time import StepTime, step_time
from ringworld_jobs.planner.workload import Workload, workload
from ringworld_jobs.spec import JobSpec
from ringworld_model.config import ModelConfig, can_split_heads


class PlanError(ValueError):
    """A stage that this hardware cannot form a mesh for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """One stage.

    Attributes:
        index: place in the curriculum, from 0.
        name: the stage's name.
        wanted: the mesh that the spec asks for.
        mesh: the mesh on the workers that there are.
        reason: why.
        work: what each worker has to hold and compute.
        memory: of each worker.
        time: of one step.
        saving: its checkpoints.
        device: what each worker runs on.
    """

    index: int
    name: str
    wanted: MeshSize
    mesh: MeshSize
    reason: str
    work: Workload
    memory: Memory
    time: StepTime
    saving: Saving
    device: Device

    @property
    def on_host_bytes(self) -> float:
        """What a worker takes of host memory; on a CPU all of it."""
        beside = self.memory.device_bytes if self.device.is_cpu else 0.0
        return self.memory.host_bytes + beside

    @property
    def fits_device(self) -> bool:
        """Whether device memory is enough."""
        return self.device.is_cpu or self.memory.device_bytes <= self.device.memory_bytes

    @property
    def fits_host(self) -> bool:
        """Whether host memory is enough."""
        return self.on_host_bytes <= self.device.host_bytes

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.fits_device and self.fits_host

    @property
    def step_seconds(self) -> float:
        """A step, its share of the checkpoints' stall included."""
        return self.time.total + self.saving.stall_per_step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the whole gang, padding included."""
        return self.work.step_tokens / self.step_seconds

    @property
    def stage_seconds(self) -> float:
        """All steps."""
        return self.step_seconds * self.work.stage.num_steps

    @property
    def device_hours(self) -> float:
        """Hours times workers."""
        return self.stage_seconds * self.mesh.world_size / 3600

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak of all devices; only causal pairs count."""
        peak = self.device.peak(self.work.stage.precision) * self.mesh.world_size
        return self.work.model_flops / (self.step_seconds * peak)


@dataclass(frozen=True, slots=True)
class JobEstimate:
    """All stages of a job."""

    hardware: Hardware
    stages: tuple[StageEstimate, ...]

    @property
    def device_hours(self) -> float:
        """Of all stages."""
        return sum(stage.device_hours for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages, one after the other."""
        return sum(stage.stage_seconds for stage in self.stages)


def estimate_job(spec: JobSpec, hardware: Hardware, model: ModelConfig) -> JobEstimate:
    """Estimate every stage.

    Args:
        spec: the job.
        hardware: what there is.
        model: the model's shape, see ``plan.model_config``.

    Raises:
        PlanError: a stage finds no mesh.
    """
    stages = (estimate_stage(spec, index, hardware, model) for index in range(len(spec.stages)))
    return JobEstimate(hardware, tuple(stages))


def estimate_stage(
    spec: JobSpec,
    index: int,
    hardware: Hardware,
    model: ModelConfig,
    mesh: MeshSize | None = None,
) -> StageEstimate:
    """Estimate one stage.

    Args:
        spec: the job.
        index: the stage.
        hardware: what there is.
        model: the model's shape.
        mesh: on which it runs; chosen as training does if None.

    Raises:
        PlanError: it finds no mesh.
    """
    stage, device = spec.stages[index], hardware.device
    wanted, found = choose_mesh(spec, index, hardware.count, model)
    mesh = mesh or found
    work = workload(spec, index, model, mesh)
    time = step_time(work, device)
    return StageEstimate(
        index=index,
        name=stage.name,
        wanted=wanted,
        mesh=mesh,
        reason=mesh_reason(stage, spec.resources, wanted, mesh, hardware.count),
        work=work,
        memory=memory_of(spec, work, device),
        time=time,
        saving=saving(spec, work, device, time.total),
        device=device,
    )


def choose_mesh(
    spec: JobSpec, index: int, available: int, model: ModelConfig
) -> tuple[MeshSize, MeshSize]:
    """The mesh that a stage wants, and the one that it gets; both as training chooses them.

    Args:
        spec: the job.
        index: the stage.
        available: workers that there are.
        model: its heads decide how they can be split.

    Raises:
        PlanError: the spec's mesh is impossible, or there are too few workers for any.
    """
    stage, where = spec.stages[index], f"stages[{index}] ({spec.stages[index].name})"
    try:
        wanted = resolve_mesh(stage, spec.resources)
    except MeshError as error:
        raise PlanError(f"{where}.{error.field}: {error}") from error
    if wanted.world_size <= available:
        return wanted, wanted
    may_split = partial(can_split_heads, model.num_heads, model.num_kv_heads)
    smaller = shrink_mesh(stage, spec.resources, available, may_split=may_split)
    if smaller is None:
        raise PlanError(
            f"{where}: it wants {wanted.world_size} workers and takes no fewer than "
            f"resources.workers.min = {spec.resources.workers.min}, and there are {available}; "
            "lower it, or plan for more"
        )
    return wanted, smaller
