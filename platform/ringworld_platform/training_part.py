"""A stage's training as a part of its job."""

from __future__ import annotations

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.spec import JobSpec
from ringworld_platform.live_run import LiveRun
from ringworld_platform.mesh_choice import MeshChoice
from ringworld_platform.parts import Device, Result
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.stage_setup import stage_job
from ringworld_workers.stage_job import StageJob


class TrainingPart:
    """See ``Part``."""

    leaving = "saves a checkpoint before its next step"

    def __init__(self, live: LiveRun, spec: JobSpec, index: int, meshes: MeshChoice) -> None:
        """Take the stage.

        Args:
            live: the run.
            spec: of its job.
            index: which of its stages.
            meshes: remembers over stages and restarts what was waited for.
        """
        self._live, self._spec, self._index, self._meshes = live, spec, index, meshes
        self._stage = spec.stages[index]
        self.name = self._stage.name
        self.title = f"stage {self._stage.name}"

    def function(self, config: RunnerConfig) -> str:
        """See ``Part.function``."""
        return config.stage_function

    def begin(self, there: int) -> MeshSize:
        """See ``Part.begin``."""
        live, stage = self._live, self._stage
        mesh = self._meshes.begin(self._index, there)
        live.set_fields(
            stage=stage.name,
            stage_index=self._index,
            num_steps=stage.num_steps,
            step=0,
            attempt=max(1, live.record.attempt),
            context_length=stage.context_length,
            ring_size=mesh.ring_size,
            heads_size=mesh.heads_size,
            data_parallel_size=mesh.data_parallel_size,
        )
        return mesh

    def waiting(self, there: int, shortage: str) -> str:
        """See ``Part.waiting``."""
        return self._meshes.waiting(there, shortage)

    def explain(self, mesh: MeshSize) -> str | None:
        """See ``Part.explain``."""
        return self._meshes.explain(mesh)

    def job(self, mesh: MeshSize, device: Device) -> StageJob:
        """See ``Part.job``."""
        return stage_job(self._live, self._spec, self._index, mesh, device)

    def stopped(self, result: Result) -> str:
        """See ``Part.stopped``; where its state could not be saved, that."""
        live = self._live
        live.set_fields(checkpoint=result.get("checkpoint") or live.record.checkpoint)
        return str(result.get("unsaved", ""))

    def done(self, result: Result) -> None:
        """See ``Part.done``."""
        live = self._live
        live.set_fields(stages_done=self._index + 1, restarts=0, rollbacks=0, error=None)
        live.event("stage", f"stage {self._stage.name} is done", stage_index=self._index)
        live.save()
