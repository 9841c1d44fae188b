"""Which part of a job comes next, by what its record says is done."""

from __future__ import annotations

from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.model_job import ModelJob
from ringworld_platform.evaluation_part import EvaluationPart, asked_of_job, asked_of_stage
from ringworld_platform.live_run import LiveRun
from ringworld_platform.mesh_choice import MeshChoice
from ringworld_platform.parts import Part
from ringworld_platform.training_part import TrainingPart


class Agenda:
    """The parts of one run's job, in order; a stage's evaluations follow its training."""

    def __init__(self, live: LiveRun, *, patient: bool) -> None:
        """Take the run.

        Args:
            live: the run.
            patient: False where no node can ever come: nothing is waited for.
        """
        self._live, self._patient = live, patient
        self._meshes: MeshChoice | None = None

    def next(self) -> Part | None:
        """The part to do now; None where all are done.

        Raises:
            PlatformError: the job's workers cannot form its mesh.
        """
        live, spec = self._live, self._live.spec
        if isinstance(spec, ModelJob):
            done = live.record.evaluated > 0
            return None if done else EvaluationPart(live, asked_of_job(live, spec))
        while (index := live.record.evaluated) < live.record.stages_done:
            if any(spec.stages[index].evaluations.tasks()):
                return EvaluationPart(live, asked_of_stage(live, spec, index))
            live.set_fields(evaluated=index + 1)
        if live.record.stages_done < len(spec.stages):
            # Remembers over the stages what was waited for in vain.
            self._meshes = self._meshes or MeshChoice(spec, patient=self._patient)
            return TrainingPart(live, spec, live.record.stages_done, self._meshes)
        return None

    @property
    def ended(self) -> str:
        """What to say when all is done."""
        if isinstance(self._live.spec, GenerateSpec):
            return "all prompts were asked"
        if isinstance(self._live.spec, ModelJob):
            return "all evaluations are done"
        return f"all {len(self._live.spec.stages)} stages are done"
