"""A stage's last checkpoint as a version of a registered model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ringworld_jobs.any_job import Job
from ringworld_jobs.resolve import spec_digest
from ringworld_jobs.units import format_tokens
from ringworld_platform.run_claims import checkpoints_url
from ringworld_platform.run_records import Record


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version; the checkpoint's URL is its identity.

    Attributes:
        model: the registered model's name.
        url: of the checkpoint in its store.
        alias: points to the newest version of its context length.
        description: one line for people.
        tags: where it comes from, and how to use it.
    """

    model: str
    url: str
    alias: str
    description: str
    tags: Mapping[str, str]


def _absolute(url: str) -> str:
    """A ``file://`` URL may be of a relative path, which means nothing on a server."""
    scheme, _, path = url.partition("://")
    return f"file://{os.path.abspath(path)}" if scheme == "file" else url


def model_version(spec: Job, run_id: str, record: Record, tokens: int) -> ModelVersion | None:
    """The version that a ``stage_end`` record makes; None where the job wants none.

    Args:
        spec: the job.
        run_id: its run.
        record: a ``stage_end`` record.
        tokens: that the run has consumed by then.
    """
    index, key = int(record["stage_index"]), record.get("checkpoint")
    asked = spec.tracking.registered_model
    if asked == "off" or not key or index >= len(spec.stages):
        return None
    stage = spec.stages[index]
    url = _absolute(f"{checkpoints_url(spec, run_id)}/{key}")
    context = format_tokens(stage.context_length)
    step = int(record.get("step", 0))
    return ModelVersion(
        model=spec.name if asked == "auto" else asked,
        url=url,
        alias=f"latest-{context}",
        description=(
            f"stage {stage.name} of {run_id} after {step} steps: context {context}, RoPE theta "
            f"{stage.rope_theta:g}"
        ),
        tags={
            "checkpoint": url,
            "run_id": run_id,
            "stage": stage.name,
            "step": str(step),
            "global_step": str(int(record.get("global_step", step))),
            "tokens": str(tokens),
            "context_length": str(stage.context_length),
            "rope_theta": f"{stage.rope_theta:g}",
            "spec_digest": spec_digest(spec),
        },
    )
