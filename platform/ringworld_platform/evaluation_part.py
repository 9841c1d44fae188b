"""The evaluations of one model as a part of a job: asked, summed up, drawn, and judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.model_job import ModelJob
from ringworld_jobs.spec import JobSpec
from ringworld_platform.checkpoint_places import Place
from ringworld_platform.errors import PlatformError
from ringworld_platform.evaluation_pictures import draw
from ringworld_platform.evaluation_records import (
    EVALUATION,
    answers_file,
    figures_of,
    read_answers,
    read_figures,
    told,
)
from ringworld_platform.gang_watch import GangFailed
from ringworld_platform.job_ends import JobFailed
from ringworld_platform.live_run import LiveRun
from ringworld_platform.mesh_choice import MeshChanged
from ringworld_platform.own_answers import TASK as OWN_PROMPTS
from ringworld_platform.own_answers import answers_url, write_answers
from ringworld_platform.parts import Device, Result
from ringworld_platform.recovery import Failure, FailureKind
from ringworld_platform.run_claims import checkpoints_url, run_url
from ringworld_platform.run_records import Record
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.stage_setup import mesh_of, sources_of
from ringworld_workers.store.base import StoreError

if TYPE_CHECKING:
    from ringworld_workers.evaluate.job import EvaluationJob
    from ringworld_workers.generation.source import ModelSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is asked of which model.

    Attributes:
        stage: the stage whose model it is; of a job without stages, its name.
        index: of the stage.
        step: its steps.
        global_step: steps of the job up to its end.
        place: where the model's checkpoint is.
        tokenizer: of its text, where that is not found by itself.
        codebook: of its frames, likewise.
        evaluations: what is asked.
        mesh: of the gang for a context length, if there are workers enough; heads are not split.
        precision: of weights and computation.
        context_length: longest row; 0: the model's own.
        mixture: share of each source.
        first_mixture: that of the job's first stage.
        first_context_length: of the job's first stage.
        files_url: of the store that files of answers go to.
    """

    stage: str
    index: int
    step: int
    global_step: int
    place: Place | str
    tokenizer: str | None
    codebook: str | None
    evaluations: EvaluateSpec
    mesh: Callable[[int], MeshSize]
    precision: str
    context_length: int
    mixture: dict[str, float]
    first_mixture: dict[str, float]
    first_context_length: int
    files_url: str


def asked_of_stage(live: LiveRun, spec: JobSpec, index: int) -> Asked:
    """What a stage asks of its own model.

    Raises:
        PlatformError: the job's workers cannot form the stage's mesh.
    """
    stage, first = spec.stages[index], spec.stages[0]
    mesh = mesh_of(spec, index)
    run_id = live.run_id
    return Asked(
        stage=stage.name,
        index=index,
        step=stage.num_steps,
        global_step=sum(each.num_steps for each in spec.stages[: index + 1]),
        place=Place(
            run_url(spec, run_id),
            checkpoints_url(spec, run_id),
            stage.name,
            folder=live.folder.path,
        ),
        tokenizer=None,
        codebook=None,
        evaluations=stage.evaluations,
        mesh=lambda _: MeshSize(mesh.sequence_parallel_size, mesh.data_parallel_size),
        precision=stage.precision,
        context_length=stage.context_length,
        mixture=dict(stage.mixture),
        first_mixture=dict(first.mixture),
        first_context_length=first.context_length,
        files_url=answers_url(spec, run_id, stage.name),
    )


def asked_of_job(live: LiveRun, spec: ModelJob) -> Asked:
    """What a job without stages asks.

    Raises:
        PlatformError: a source is of a dataset that the recipe no longer has.
    """
    prepared = live.record.prepared or {}
    mixture = dict.fromkeys(sources_of(live.spec, prepared.get("datasets", {})), 1.0)
    return Asked(
        stage=spec.name,
        index=0,
        step=0,
        global_step=0,
        place=spec.model,
        tokenizer=spec.tokenizer,
        codebook=spec.codebook,
        evaluations=spec.evaluations,
        mesh=spec.mesh_for,
        precision=spec.precision,
        context_length=spec.context_length or 0,
        mixture=mixture,
        first_mixture=mixture,
        first_context_length=0,
        files_url=answers_url(live.spec, live.run_id),
    )


class EvaluationPart:
    """See ``Part``."""

    leaving = "keeps what is answered, and stops before the next item"

    def __init__(self, live: LiveRun, asked: Asked) -> None:
        """Take what is asked; the model is looked for when the gang begins."""
        self._live, self._asked = live, asked
        self._wanted = self._tried = MeshSize(1, 1)
        self.name = f"{asked.stage}-evaluate"
        what = "answers of" if isinstance(live.spec, GenerateSpec) else "evaluation of"
        self.title = f"{what} {asked.stage}"

    def function(self, config: RunnerConfig) -> str:
        """See ``Part.function``."""
        return config.evaluate_function

    def begin(self, there: int) -> MeshSize:
        """See ``Part.begin``. With fewer workers than a stage has it just takes longer."""
        live, asked = self._live, self._asked
        self._wanted = asked.mesh(self._context_length)
        mesh = self._tried = fitting(self._wanted, there)
        live.set_fields(
            stage=asked.stage,
            stage_index=asked.index,
            num_steps=asked.step,
            step=asked.step,
            attempt=max(1, live.record.attempt),
            context_length=self._context_length,
            ring_size=mesh.ring_size,
            heads_size=mesh.heads_size,
            data_parallel_size=mesh.data_parallel_size,
        )
        return mesh

    def waiting(self, there: int, shortage: str) -> str:
        """See ``Part.waiting``."""
        if fitting(self._wanted, there) != self._tried:
            raise MeshChanged
        return shortage

    def explain(self, mesh: MeshSize) -> str | None:
        """See ``Part.explain``."""
        if mesh == self._wanted:
            return None
        return (
            f"{self.title} runs on {mesh}, not {self._wanted}: the cluster holds no more "
            "workers; it asks the same"
        )

    def job(self, mesh: MeshSize, device: Device) -> EvaluationJob:
        """See ``Part.job``."""
        from ringworld_workers.evaluate.job import EvaluationJob

        live, asked, model = self._live, self._asked, self._model
        prepared = live.record.prepared or {}
        return EvaluationJob(
            run_id=live.run_id,
            attempt=live.record.attempt,
            world_size=mesh.world_size,
            sequence_parallel_size=mesh.sequence_parallel_size,
            data_parallel_size=mesh.data_parallel_size,
            device=device,
            precision="bf16" if asked.precision == "bf16" else "fp32",
            stage_name=asked.stage,
            stage_index=asked.index,
            step=asked.step,
            global_step=asked.global_step,
            model=model,
            evaluations=asked.evaluations,
            seed=live.spec.seed,
            context_length=self._context_length,
            sources=sources_of(live.spec, prepared.get("datasets", {})),
            mixture=asked.mixture,
            first_mixture=asked.first_mixture,
            first_context_length=asked.first_context_length or self._context_length,
            data=live.spec.data,
            earlier=tuple(
                found
                for found in read_figures(live.folder.path)
                if int(found["stage_index"]) < asked.index
            ),
            files_url=asked.files_url,
            answers=tuple(read_answers(live.folder.path, asked.index, asked.stage)),
        )

    @property
    def _context_length(self) -> int:
        return self._asked.context_length or self._model.context_length

    @cached_property
    def _model(self) -> ModelSource:
        from ringworld_platform.model_places import find_model, find_run_model

        asked = self._asked
        tokenizer, codebook = (
            Path(name) if name else None for name in (asked.tokenizer, asked.codebook)
        )
        try:
            if isinstance(asked.place, Place):
                return find_run_model(asked.place)
            runs = self._live.folder.path.parent
            return find_model(asked.place, runs, tokenizer=tokenizer, codebook=codebook)
        except StoreError as error:
            if error.transient:
                raise GangFailed(Failure(FailureKind.STORE, str(error))) from error
            raise
        except ValueError as error:
            raise PlatformError(f"the model of {self.title}: {error}") from error

    def stopped(self, result: Result) -> str:
        """See ``Part.stopped``."""
        return f"stopped in the {self.title}; {result.get('kept', 0)} answers are kept"

    def done(self, result: Result) -> None:
        """See ``Part.done``: figures into the logs, pictures drawn, limits judged."""
        live, asked = self._live, self._asked
        missed: list[str] = []
        for found in result["evaluations"]:
            record = self._record(found)
            live.folder.append_answers(answers_file(asked.index, asked.stage), [record])
            live.metrics([record])
            main = next(iter(figures_of(record).items()), ("", None))
            about = {"task": found["task"], "stage": asked.stage, "figure": main[1]}
            live.event(EVALUATION, told(record), **about)
            missed += self._missed(found["task"], found["figures"])
        # One save: a controller that comes after this one must not go past a limit unseen.
        live.set_fields(evaluated=asked.index + 1, restarts=0, error=None, missed="; ".join(missed))
        live.save()
        refuse_missed(live)

    def _record(self, found: Record) -> Record:
        asked, live = self._asked, self._live
        task, figures = str(found["task"]), found["figures"]
        answers = [
            each
            for each in read_answers(live.folder.path, asked.index, asked.stage)
            if each["task"] == task
        ]
        name = f"{asked.index:02d}-{asked.stage}-{task}"
        title = f"{task.replace('_', ' ')}, {live.run_id} {asked.stage}"
        files = draw(live.folder.path, name, task, answers, figures, title)
        if task == OWN_PROMPTS:
            self._hand_out(answers)
        return {
            "kind": EVALUATION,
            "stage": asked.stage,
            "stage_index": asked.index,
            "step": asked.step,
            "global_step": asked.global_step,
            "attempt": live.record.attempt,
            "time": time.time(),
            "task": task,
            "model": found["model"],
            "items": found["items"],
            **figures,
            "files": [answers_file(asked.index, asked.stage), *files],
        }

    def _hand_out(self, answers: list[Record]) -> None:
        """Write the answers to prompts where the user takes them."""
        try:
            place = write_answers(self._asked.files_url, answers)
        except StoreError as error:
            if error.transient:
                raise GangFailed(Failure(FailureKind.STORE, str(error))) from error
            raise
        failed = [answer for answer in answers if "problem" in answer]
        count = len(answers) - len(failed)
        self._live.event("answers", f"{count} answers are in {place}", place=place)
        for answer in failed:
            self._live.event("unanswered", f"line {answer['line']}: {answer['problem']}")

    def _missed(self, task: str, figures: dict[str, float]) -> Iterator[str]:
        """The limits that end the job; those that do not are told of here."""
        settings = dict(self._asked.evaluations.tasks())[task]
        for gate in settings.gates():
            value = figures.get(gate.figure)
            if value is not None and not gate.missed(value):
                continue
            bound = "at least" if gate.least else "at most"
            found = "there is no such figure" if value is None else f"it is {value:.4g}"
            text = (
                f"evaluate.{task}.{gate.field} of {self._asked.stage}: {gate.figure} must be "
                f"{bound} {gate.limit:g}, and {found}"
            )
            if settings.on_missed == "stop":
                yield text
            else:
                self._live.event("gate", text, task=task, figure=value, limit=gate.limit)


def refuse_missed(live: LiveRun) -> None:
    """End the job where an evaluation has missed a limit, and no resume has come since.

    Raises:
        JobFailed: with the figure, the limit and the remedy.
    """
    if live.record.missed:
        remedy = "Train for longer or change the limit, and submit that as a new job"
        if isinstance(live.spec, GenerateSpec):
            remedy = "The events say which; mend them or raise the limit in a new job"
        raise JobFailed(
            f"{live.record.missed}. {remedy}; or go on all the same: "
            f"`ringworld resume {live.run_id}`"
        )


def fitting(wanted: MeshSize, there: int) -> MeshSize:
    """The mesh on the workers that there are: fewer rings first, then a shorter ring."""
    if there < 1 or there >= wanted.world_size:
        return wanted
    ring_size = min(wanted.ring_size, there)
    return MeshSize(ring_size, there // ring_size)
