"""Jobs of one stage to plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.plan import model_config
from ringworld_jobs.planner.workload import Workload, workload
from ringworld_jobs.spec import JobSpec

MakeJob = Callable[..., JobSpec]
MakeWork = Callable[..., Workload]


@pytest.fixture(scope="session")
def make_job() -> MakeJob:
    """A text model's job; keys of its stage as arguments."""

    def make(preset: str = "llama2-7b", workers: int = 8, fewest: int = 1, **stage: Any) -> JobSpec:
        given = {"context_length": 32768, "global_batch_tokens": 2**20, "precision": "bf16"}
        fixed = {
            "name": "only",
            "rope_theta": 1e6,
            "steps": 100,
            "mixture": {"books": 1},
            "learning_rate": {"peak": 1e-4},
        }
        return JobSpec.model_validate(
            {
                "kind": "train",
                "name": "planned",
                "model": {"preset": preset, "vision": {"codebook_size": 0}},
                "data": {"sources": {"books": {"shards": "books"}}},
                "resources": {"accelerator": "gpu", "workers": {"min": fewest, "max": workers}},
                "stages": [given | fixed | stage],
            }
        )

    return make


@pytest.fixture(scope="session")
def make_work(make_job: MakeJob) -> MakeWork:
    """The same stage's workload on a mesh."""

    def make(ring: int = 1, rings: int = 1, heads: int = 1, **keys: Any) -> Workload:
        spec = make_job(**keys)
        return workload(spec, 0, model_config(spec), MeshSize(ring, rings, heads))

    return make
