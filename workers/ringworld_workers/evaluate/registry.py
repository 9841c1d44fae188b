"""Which code does which task: loaded only where the task is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_workers.evaluate.task import MakeTask, Subject, Task

TASKS = {
    "validation": "ringworld_workers.evaluate.validation:ValidationRows",
    "perplexity": "ringworld_workers.evaluate.perplexity:Perplexity",
    "short_context": "ringworld_workers.evaluate.short_context:ShortContext",
    "needle": "ringworld_workers.evaluate.needle:SingleNeedle",
    "multi_needle": "ringworld_workers.evaluate.multi_needle:MultiNeedle",
    "video_needle": "ringworld_workers.evaluate.video_needle:VideoNeedle",
    "questions": "ringworld_workers.evaluate.questions:Questions",
    "reconstruction": "ringworld_workers.evaluate.reconstruction:Reconstruction",
    "generate": "ringworld_workers.evaluate.own_prompts:OwnPrompts",
}
"""``module:class`` of each field of ``EvaluateSpec``; the class takes (settings, subject)."""


def make_tasks(evaluations: EvaluateSpec, subject: Subject) -> Sequence[Task]:
    """The tasks that are asked for, in order.

    Raises:
        ValueError: a task cannot be done on this model or data; says why.
    """
    made = []
    for name, settings in evaluations.tasks():
        module, _, function = TASKS[name].partition(":")
        make: MakeTask = getattr(importlib.import_module(module), function)
        made.append(make(settings, subject))
    return made
