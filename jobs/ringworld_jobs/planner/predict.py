"""What a stage of a run is expected to show in its own records."""

from __future__ import annotations

from dataclasses import dataclass

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.plan import model_config
from ringworld_jobs.planner.estimate import estimate_stage
from ringworld_jobs.planner.hardware import Hardware
from ringworld_jobs.spec import JobSpec
from ringworld_model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Prediction:
    """One stage's figures, as a run measures them.

    Attributes:
        step_seconds: of a step without a checkpoint.
        memory_bytes: of one worker: the peak of its tensors on a GPU, all that its process takes
            on a CPU.
    """

    step_seconds: float
    memory_bytes: float


def predict(
    spec: JobSpec,
    stage_index: int,
    hardware: Hardware,
    *,
    model: ModelConfig | None = None,
    mesh: MeshSize | None = None,
) -> Prediction:
    """Predict what a stage's step records will say.

    Args:
        spec: the job.
        stage_index: the stage.
        hardware: what its workers run on.
        model: the model's shape; as far as spec and recipe tell if None.
        mesh: what it runs on; chosen as training does if None.

    Raises:
        PlanError: it finds no mesh.
    """
    found = estimate_stage(spec, stage_index, hardware, model or model_config(spec), mesh)
    on_cpu = hardware.device.is_cpu
    memory = found.on_host_bytes if on_cpu else found.memory.allocated_bytes
    return Prediction(found.time.total, memory)
