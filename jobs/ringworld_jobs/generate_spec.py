"""The generation job: many prompts asked of a model that is there already."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ringworld_jobs.evaluate_generate import GenerateSettings, GenerateTask
from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_jobs.model_job import ModelJob
from ringworld_jobs.spec_data import DataSpec


class GenerateSpec(GenerateSettings, ModelJob):
    """Answers of one model to a file of prompts, as a job of its own."""

    kind: Literal["generate"]
    """What the file is: generate."""
    out: Annotated[str, Field(min_length=1)] | None = None
    """Where answers go: a folder, relative to the working directory, or s3://BUCKET/PREFIX; the
    run's name is appended. Empty: `answers` in the run's folder in checkpoint.store."""

    @property
    def data(self) -> DataSpec:
        """It needs no prepared data."""
        return DataSpec()

    @property
    def evaluations(self) -> EvaluateSpec:
        """The one task that it is."""
        settings = {name: getattr(self, name) for name in GenerateSettings.model_fields}
        return EvaluateSpec(generate=GenerateTask(**settings))
