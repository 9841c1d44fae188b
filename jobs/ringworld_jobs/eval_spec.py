"""The evaluation job: what is asked of a model that is there already."""

from __future__ import annotations

from typing import Literal

from ringworld_jobs.evaluate_spec import EvaluateSpec, Evaluations, asked_for
from ringworld_jobs.model_job import ModelJob
from ringworld_jobs.spec_data import DataSpec

NEED_DATA = ("validation", "perplexity", "short_context")
"""Tasks that score held-out data."""


class EvalSpec(ModelJob):
    """Evaluations of one model, as a job of its own."""

    kind: Literal["eval"]
    """What the file is: eval."""
    evaluate: Evaluations
    """What is asked: names of tasks, or a mapping of them to settings."""
    data: DataSpec = DataSpec()
    """Prepared data, for the tasks that score held-out rows and documents."""

    @property
    def evaluations(self) -> EvaluateSpec:
        """What `evaluate` asks for, with every task's settings."""
        return asked_for(self.evaluate)
