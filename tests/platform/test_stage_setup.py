"""What a stage's ranks are handed."""

from __future__ import annotations

import pytest

from ringworld_jobs.spec import JobSpec
from ringworld_platform.errors import PlatformError
from ringworld_platform.stage_setup import sources_of

JOB = {
    "kind": "train",
    "name": "a",
    "data": {
        "recipe": "/recipe.yaml",
        "sources": {"long": {"dataset": "books"}, "more": {"shards": "s3://bucket/more"}},
    },
    "stages": [
        {
            "name": "s",
            "context_length": 1024,
            "rope_theta": 1e4,
            "steps": 1,
            "global_batch_tokens": 1024,
            "learning_rate": {"peak": 1e-3},
            "mixture": {"long": 1},
        }
    ],
}


def test_sources_are_of_the_recipe_as_it_was_built() -> None:
    spec = JobSpec.model_validate(JOB)
    found = sources_of(spec, {"books": "/data/books"})
    assert found == {
        "books": "/data/books",
        "long": "/data/books",
        "more": "s3://bucket/more",
    }
    # The recipe was changed after the job was submitted.
    with pytest.raises(PlatformError, match=r"has no dataset 'books' any more \(it has novels\)"):
        sources_of(spec, {"novels": "/data/novels"})
