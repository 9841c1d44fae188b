"""Evaluations in stages and as jobs: what they mean, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ringworld_jobs.any_job import load_any_job, parse_job
from ringworld_jobs.eval_spec import EvalSpec
from ringworld_jobs.evaluate_spec import EvaluateSpec, TaskName, asked_for
from ringworld_jobs.load import eval_of, load_eval, load_job
from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.problem import JobSpecError
from ringworld_jobs.resolve import resolved, resolved_yaml, spec_digest
from ringworld_jobs.spec import JobSpec


def train_job(folder: Path, own: Any, **defaults: Any) -> Path:
    stage = {
        "name": "4k",
        "context_length": "4Ki",
        "rope_theta": 1e5,
        "steps": 2,
        "global_batch_tokens": "64Ki",
        "learning_rate": {"peak": 1e-3},
        "mixture": {"novels": 1},
    }
    if own is not None:
        stage["evaluate"] = own
    path = folder / "job.yaml"
    data = {"sources": {"novels": {"shards": "novels"}}}
    job = {"kind": "train", "name": "books", "data": data, "defaults": defaults, "stages": [stage]}
    path.write_text(yaml.safe_dump(job))
    return path


def eval_job(folder: Path, **fields: Any) -> Path:
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump({"kind": "eval", "name": "after", **fields}))
    return path


@pytest.mark.parametrize(
    ("evaluate", "told"),
    [
        (["perplexty"], "stages[0].evaluate[0] = 'perplexty': expected validation, perplexity"),
        (["perplexty"], "did you mean perplexity?"),
        ({"perplexty": {}}, "stages[0].evaluate.perplexty: unknown key; did you mean perplexity?"),
        ({"perplexity": {"max_los": 2}}, "unknown key; did you mean max_loss?"),
        ({"perplexity": {"max_loss": 0}}, "expected a number above 0"),
        ({"validation": {"rows": 0}}, "expected a whole number of at least 1"),
        ({"perplexity": {"on_missed": "fail"}}, "expected stop or warn"),
        (
            {"perplexity": {"lengths": ["2Ki", "8Ki"]}},
            "8Ki tokens are more than the context of 4Ki",
        ),
        ({"short_context": {"lengths": [2000]}}, "did you mean 2Ki?"),
        ("needle", "expected a list of"),
        ([], "empty; give at least one"),
    ],
)
def test_what_is_wrong_with_evaluations_is_said_in_full(
    tmp_path: Path, evaluate: Any, told: str
) -> None:
    with pytest.raises(JobSpecError) as caught:
        load_job(train_job(tmp_path, evaluate), check_files=False)
    assert told in str(caught.value) and len(caught.value.problems) == 1


def test_names_and_settings_mean_the_same_and_come_from_defaults_too(tmp_path: Path) -> None:
    by_name = load_job(train_job(tmp_path, ["perplexity"]), check_files=False)
    by_default = load_job(
        train_job(tmp_path, None, evaluate={"perplexity": None}), check_files=False
    )
    assert by_name.stages[0].evaluations == by_default.stages[0].evaluations
    assert [name for name, _ in by_name.stages[0].evaluations.tasks()] == ["perplexity"]
    assert JobSpec.model_validate(resolved(by_default)) == by_default
    none = load_job(train_job(tmp_path, None), check_files=False)
    assert not list(none.stages[0].evaluations.tasks())


def test_limits_follow_from_the_fields_names() -> None:
    (settings,) = (
        settings
        for _, settings in asked_for(
            EvaluateSpec.model_validate({"perplexity": {"max_loss": 2, "min_gain": -0.1}})
        ).tasks()
    )
    loss, gain = settings.gates()
    assert (loss.field, loss.figure, loss.limit, loss.least) == ("max_loss", "loss", 2.0, False)
    assert [loss.missed(value) for value in (2.0, 2.01, float("nan"))] == [False, True, True]
    assert [gain.missed(value) for value in (-0.1, -0.2)] == [False, True]


def test_every_name_is_a_task() -> None:
    assert set(get_args(TaskName)) <= set(EvaluateSpec.model_fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"evaluate": ["needle"]}, "model: missing; it takes text"),
        ({"model": "a-1"}, "evaluate: missing"),
        ({"model": "a-1", "evaluate": {}}, "nothing is asked; name a task"),
        ({"model": "a-1", "evaluate": ["perplexity"]}, "perplexity scores held-out data, and the"),
        (
            {"model": "a-1", "evaluate": ["needle"], "mesh": {"data_parallel": 3}},
            "ring 1 x data_parallel 3 = 3 workers, and resources.workers.max is 1; raise it to 3",
        ),
        ({"model": "a-1", "evaluate": ["needle"], "stages": []}, "stages: unknown key"),
    ],
)
def test_what_is_wrong_with_a_job_of_evaluations_is_said(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(JobSpecError) as caught:
        load_eval(eval_job(tmp_path, **fields), check_files=False)
    assert told in str(caught.value) and len(caught.value.problems) == 1


def test_a_job_of_evaluations_comes_back_as_it_was(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    sources = {"sources": {"novels": {"shards": "novels"}}}
    path = eval_job(
        tmp_path, model="weights", evaluate={"perplexity": {}}, data=sources, tokenizer="t.json"
    )
    spec = load_any_job(path, check_files=False)
    assert isinstance(spec, EvalSpec)
    assert spec.model == str(weights) and spec.tokenizer == str(tmp_path / "t.json")
    assert spec.data.sources["novels"].shards == str(tmp_path / "novels")
    assert parse_job(resolved(spec)) == spec
    again = tmp_path / "spec.yaml"
    again.write_text(resolved_yaml(spec))
    assert load_any_job(again, check_files=False) == spec
    assert spec_digest(spec) == spec_digest(parse_job(resolved(spec)))  # type: ignore[arg-type]
    named = load_eval(eval_job(tmp_path, model="run-1/4k", evaluate=["needle"]))
    assert named.model == "run-1/4k"


def test_rings_hold_the_context_and_fill_the_workers() -> None:
    def mesh(context_length: int, most: int, **mesh: Any) -> MeshSize:
        values = {
            "kind": "eval",
            "name": "x",
            "model": "a-1",
            "evaluate": ["needle"],
            "mesh": mesh,
            "resources": {"workers": {"max": most}},
        }
        return eval_of(values, "test").mesh_for(context_length)

    assert mesh(32 * 1024, 8) == MeshSize(1, 8)
    assert mesh(128 * 1024, 8) == MeshSize(4, 2)
    assert mesh(1024 * 1024, 8) == MeshSize(8, 1)
    assert mesh(4096, 8, sequence_parallel={"ring": 2, "heads": 2}) == MeshSize(4, 2)
    assert mesh(4096, 8, sequence_parallel=2, data_parallel=1) == MeshSize(2, 1)


def test_a_file_of_another_kind_names_its_command(tmp_path: Path) -> None:
    path = eval_job(tmp_path, model="a-1", evaluate=["needle"])
    with pytest.raises(JobSpecError, match=r"a job of evaluations .*there is `ringworld run`"):
        load_job(path, check_files=False)
