"""Jobs of prompts: what they mean, and what is said of wrong ones before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ringworld_jobs.any_job import load_any_job, parse_job
from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_jobs.load import load_generate, load_job
from ringworld_jobs.problem import JobSpecError
from ringworld_jobs.reference import GENERATE_EXAMPLE
from ringworld_jobs.resolve import resolved, resolved_yaml, spec_digest


def generate_job(folder: Path, *lines: str, **fields: Any) -> Path:
    (folder / "asked.jsonl").write_text("\n".join(lines or ['{"prompt": "Hi"}']))
    path = folder / "generate.yaml"
    path.write_text(
        yaml.safe_dump(
            {"kind": "generate", "name": "ask", "model": "a-1", "prompts": "asked.jsonl", **fields}
        )
    )
    return path


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompts": "aske.jsonl"}, "prompts = 'aske.jsonl': "),
        ({"prompts": "aske.jsonl"}, "No such file"),
        ({"to": "picture"}, "to = 'picture': expected text, image or video"),
        ({"text": {"top_p": 2}}, "text.top_p = 2: expected a number above 0 and of at most 1"),
        ({"vision": {"temperature": -1}}, "expected a number of at least 0"),
        ({"answer_tokens": 0}, "expected a whole number of at least 1"),
        ({"to": "image", "frames": 3}, "frames = 3: an image has one; leave it out, or write to"),
        (
            {"context_length": "1Ki", "answer_tokens": 1024},
            "answer_tokens = 1024: 1,024 tokens leave no room for a prompt in a context of 1Ki",
        ),
        ({"out": "s4://mine"}, "no store of kind s4://"),
        ({"mesh": {"sequence_parallel": 2}}, "raise it to 2 or make the mesh smaller"),
        ({"evaluate": ["needle"]}, "evaluate: unknown key at the top level"),
        ({"media_frst": True}, "did you mean media_first?"),
    ],
)
def test_what_is_wrong_with_a_job_of_prompts_is_said(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(JobSpecError) as caught:
        load_generate(generate_job(tmp_path, **fields))
    assert told in str(caught.value) and len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("line", "to", "told"),
    [
        ('{"promt": "x"}', "text", "line 2: unknown key 'promt'; did you mean 'prompt'"),
        ('{"prompt": "x", "image": "none.png"}', "text", "image 'none.png': there is no such"),
        ('{"prompt": "x", "video": "a.mp4"}', "video", "line 2: media are asked about in text"),
        ('{"prompt": "x", "from": "a.mp4"}', "image", "line 2: `from` is what a video begins"),
        ('{"prompt": "{image} x", "video": "a.mp4"}', "text", "1 places {image} and there are 0"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, to: str, told: str) -> None:
    (tmp_path / "a.mp4").touch()
    path = generate_job(tmp_path, '{"prompt": "Hi"}', line, to=to)
    with pytest.raises(JobSpecError) as caught:
        load_generate(path)
    assert told in str(caught.value) and "generate.yaml:4: prompts = " in str(caught.value)


def test_a_job_of_prompts_comes_back_as_it_was(tmp_path: Path) -> None:
    path = generate_job(tmp_path, text={"temperature": 0.7}, stop=["\n"], tokenizer="t.json")
    spec = load_any_job(path)
    assert isinstance(spec, GenerateSpec)
    assert spec.prompts == str(tmp_path / "asked.jsonl")
    assert spec.tokenizer == str(tmp_path / "t.json") and spec.model == "a-1"
    assert parse_job(resolved(spec)) == spec
    again = tmp_path / "spec.yaml"
    again.write_text(resolved_yaml(spec))
    assert load_any_job(again, check_files=False) == spec
    assert spec_digest(spec) == spec_digest(parse_job(resolved(spec)))
    ((name, task),) = spec.evaluations.tasks()
    assert name == "generate"
    kept = task.model_dump()
    assert kept["text"]["temperature"] == 0.7 and kept["prompts"] == spec.prompts
    (gate,) = task.gates()
    assert (gate.figure, gate.limit, gate.least) == ("failed", 0, False)


def test_the_example_of_the_reference_page_loads(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GENERATE_EXAMPLE)
    assert load_generate(tmp_path / "job.yaml", check_files=False).text.top_p == 0.9


def test_a_stage_may_ask_prompts_too(tmp_path: Path) -> None:
    stage = {
        "name": "1k",
        "context_length": "1Ki",
        "rope_theta": 1e4,
        "steps": 2,
        "global_batch_tokens": "1Ki",
        "learning_rate": {"peak": 1e-3},
        "mixture": {"novels": 1},
        "evaluate": {"generate": {"prompts": "asked.jsonl"}},
    }
    (tmp_path / "novels").mkdir()
    (tmp_path / "novels" / "meta.json").write_text("{}")
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump(
            {
                "kind": "train",
                "name": "books",
                "data": {"sources": {"novels": {"shards": "novels"}}},
                "stages": [stage],
            }
        )
    )
    with pytest.raises(JobSpecError, match=r"evaluate\.generate\.prompts = .*No such file"):
        load_job(tmp_path / "job.yaml")
    generate_job(tmp_path)
    evaluate = load_job(tmp_path / "job.yaml").stages[0].evaluate
    assert isinstance(evaluate, EvaluateSpec) and evaluate.generate is not None
    assert evaluate.generate.prompts == str(tmp_path / "asked.jsonl")
