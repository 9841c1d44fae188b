"""What may be asked of a trained model: one model of settings for each task of `evaluate:`.

A task is a field of ``EvaluateSpec`` and a name of ``TaskName``. Its limits follow from its fields'
names: ``min_X`` and ``max_X`` are gates on the figure X of what the task finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ringworld_jobs.evaluate_base import Gate, TaskSpec, too_long
from ringworld_jobs.evaluate_generate import GenerateTask
from ringworld_jobs.evaluate_needles import MultiNeedleTask, NeedleTask, VideoNeedleTask
from ringworld_jobs.evaluate_questions import QuestionsTask, ReconstructionTask
from ringworld_jobs.spec_base import Positive, Share, Size, Spec
from ringworld_jobs.units import ContextLength

__all__ = ["EvaluateSpec", "Evaluations", "Gate", "TaskName", "TaskSpec", "asked_for", "too_long"]

TaskName = Literal[
    "validation", "perplexity", "short_context", "needle", "multi_needle", "video_needle"
]
"""Every task that can be asked for by its name alone."""


class ValidationTask(TaskSpec):
    """Loss on held-out rows, by modality and by how far into its document a token stands."""

    rows: Size = 8
    """Held-out rows scored of each kind of source, text and vision; fewer where there are fewer."""
    max_loss_text: Positive | None = None
    """Most nats per text target that pass."""
    max_loss_vision: Positive | None = None
    """Most nats per vision target that pass."""


class PerplexityTask(TaskSpec):
    """Loss against context length: the same held-out documents, cut into pieces of each length, so
    that the same tokens are predicted from ever more of what stands before them."""

    documents: Size = 4
    """Held-out documents, the longest ones."""
    lengths: Annotated[list[ContextLength], Field(min_length=1)] | Literal["auto"] = "auto"
    """Lengths of the pieces. auto: 1Ki, 2Ki, 4Ki and so on, up to the context length; in a context
    below 8Ki, from an eighth of it."""
    max_loss: Positive | None = None
    """Most nats per target at the greatest length that pass."""
    min_gain: float | None = None
    """Fewest nats per target that the greatest length must gain over the shortest."""

    def problems(self, context_length: int) -> Iterator[tuple[str, str]]:
        """See ``TaskSpec.problems``."""
        if self.lengths != "auto":
            yield from too_long("lengths", self.lengths, context_length)


class ShortContextTask(TaskSpec):
    """Whether a later stage still does well at short contexts: loss on the held-out documents of
    the job's first stage, against the best of the stages before it that have this task too."""

    documents: Size = 8
    """Held-out documents, the longest ones."""
    lengths: Annotated[list[ContextLength], Field(min_length=1)] | Literal["auto"] = "auto"
    """Lengths of the pieces that they are cut into. auto: 1Ki and 4Ki; where the first stage's
    context is below 4Ki, that and a quarter of it."""
    max_worse: Share = 0.05
    """Most that the loss may exceed the best of the stages before, as a share: 0.05 is 5 %."""
    on_missed: Literal["stop", "warn"] = "warn"
    """What happens when it does: see the other tasks. Here an event is the default."""

    def problems(self, context_length: int) -> Iterator[tuple[str, str]]:
        """See ``TaskSpec.problems``."""
        if self.lengths != "auto":
            yield from too_long("lengths", self.lengths, context_length)


class EvaluateSpec(Spec):
    """What is asked of the model, by task; an empty mapping `{}` takes a task's defaults."""

    validation: ValidationTask | None = None
    """Loss by modality and by position."""
    perplexity: PerplexityTask | None = None
    """Loss against context length."""
    short_context: ShortContextTask | None = None
    """Loss at short contexts, against the stages before."""
    needle: NeedleTask | None = None
    """One needle in a long text, by context length and depth."""
    multi_needle: MultiNeedleTask | None = None
    """Several needles in a long text."""
    video_needle: VideoNeedleTask | None = None
    """A marked frame in a long clip."""
    questions: QuestionsTask | None = None
    """Questions of one's own, with known answers."""
    reconstruction: ReconstructionTask | None = None
    """Images and videos through the codebook."""
    generate: GenerateTask | None = None
    """Answers to prompts of one's own, to be read and looked at."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """A name with nothing behind it asks for the task too."""
        if isinstance(data, dict):
            return {name: {} if value is None else value for name, value in data.items()}
        return data

    def tasks(self) -> Iterator[tuple[str, TaskSpec]]:
        """Names and settings of what is asked for, in the order of the fields."""
        for name in type(self).model_fields:
            settings = getattr(self, name)
            if settings is not None:
                yield name, settings

    def absolute(self, base: Path) -> EvaluateSpec:
        """The same with paths that mean the same wherever they are read.

        Args:
            base: folder that they are relative to: the job file's.
        """
        return self.model_copy(
            update={name: settings.absolute(base) for name, settings in self.tasks()}
        )


Evaluations = Annotated[list[TaskName], Field(min_length=1)] | EvaluateSpec
"""A list of names, or a mapping of names to settings."""


def asked_for(evaluations: Evaluations | None) -> EvaluateSpec:
    """What is asked for, with every task's settings."""
    if evaluations is None:
        return EvaluateSpec()
    if isinstance(evaluations, EvaluateSpec):
        return evaluations
    return EvaluateSpec.model_validate({name: {} for name in evaluations})
