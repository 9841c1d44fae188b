"""Jobs of prompts in a run's hands: where answers go, what is left without one, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asked_folder import write_folder

from ringworld_jobs.generate_spec import GenerateSpec
from ringworld_platform.agenda import Agenda
from ringworld_platform.answer_log import AnswerLog
from ringworld_platform.client import absolute_paths
from ringworld_platform.errors import PlatformError
from ringworld_platform.evaluated_model import settled_model
from ringworld_platform.evaluation_part import EvaluationPart
from ringworld_platform.evaluation_records import answers_file
from ringworld_platform.job_ends import JobFailed
from ringworld_platform.live_run import LiveRun, claim
from ringworld_platform.own_answers import answers_url, write_answers
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord, RunState
from ringworld_platform.run_states import RunStates
from ringworld_platform.stage_lines import stage_lines


def job(root: Path, **fields: Any) -> GenerateSpec:
    given = {
        "kind": "generate",
        "name": "ask",
        "model": "a-1",
        "prompts": "asked.jsonl",
        "checkpoint": {"store": f"file://{root}"},
        **fields,
    }
    return GenerateSpec.model_validate(given)


@pytest.fixture
def make_live(tmp_path: Path) -> Callable[..., LiveRun]:
    """A run that is at its prompts."""

    def make(**fields: Any) -> LiveRun:
        states = RunStates(tmp_path)
        made = states.create(
            "ask",
            lambda run_id, path: JobRecord(
                job="ask",
                run_id=run_id,
                run_folder=str(path),
                spec_digest="d",
                num_stages=0,
                attempt=1,
            ),
        )
        folder = RunFolder(Path(made.run_folder))
        folder.open("kind: generate\n")
        claimed = claim(states, made.run_id, "controller")
        live = LiveRun(claimed, job(tmp_path, **fields), states, folder)
        live.set_state(RunState.RUNNING, "answers of ask", stage="ask", stage_index=0)
        return live

    return make


def answer(line: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "answer",
        "stage": "ask",
        "stage_index": 0,
        "attempt": 1,
        "task": "generate",
        "id": f"{line}@d",
        "line": line,
        "prompt_id": str(line),
        "digest": "d",
        "prompt": f"number {line}",
        **({"answer": f"told {line}", "files": []} if "problem" not in more else {}),
        **more,
    }


def done(live: LiveRun, failed: int) -> None:
    part = Agenda(live, patient=False).next()
    assert isinstance(part, EvaluationPart) and part.title == "answers of ask"
    figures = {"answered": 2 - failed, "failed": failed}
    found = {"task": "generate", "model": "a-1/4k/8", "items": 2, "figures": figures}
    part.done({"evaluations": [found]})


def test_answers_are_one_file_in_the_order_of_the_prompts(
    make_live: Callable[..., LiveRun],
) -> None:
    live = make_live()
    log = AnswerLog(live)
    log.begin({"task": "generate", "items": 2, "answered": 0})
    log.hear([answer(2, answer="zwei \u00fc")])
    assert live.record.reason == "answering prompts 1/2 of ask"
    log.hear([answer(1, files=["00001.png"])])
    done(live, failed=0)
    path = live.folder.path / "answers" / "answers.jsonl"
    first, second = map(json.loads, path.read_text("utf-8").splitlines())
    assert first == {
        "id": "1",
        "digest": "d",
        "prompt": "number 1",
        "answer": "told 1",
        "files": ["00001.png"],
    }
    assert second["answer"] == "zwei \u00fc"
    texts = [event["text"] for event in live.folder.events()]
    assert f"2 answers are in file://{path}" in texts
    agenda = Agenda(live, patient=False)
    assert agenda.next() is None and agenda.ended == "all prompts were asked"


def test_a_prompt_without_an_answer_is_told_and_ends_the_job(
    make_live: Callable[..., LiveRun], tmp_path: Path
) -> None:
    live = make_live(out=f"file://{tmp_path}/elsewhere")
    broken = answer(2, problem="video b.mp4: cannot be decoded")
    live.folder.append_answers(answers_file(0, "ask"), [answer(1), broken])
    with pytest.raises(JobFailed) as caught:
        done(live, failed=1)
    assert "max_failed of ask: failed must be at most 0, and it is 1" in str(caught.value)
    assert "The events say which" in str(caught.value)
    (told,) = [event for event in live.folder.events() if event["kind"] == "unanswered"]
    assert told["text"] == "line 2: video b.mp4: cannot be decoded"
    kept = (tmp_path / "elsewhere" / live.run_id / "answers.jsonl").read_text()
    assert "told 1" in kept and '"problem": "video b.mp4' in kept


def test_of_a_changed_line_the_newest_answer_counts(tmp_path: Path) -> None:
    records = [answer(1), answer(2), answer(1, id="1@e", digest="e", answer="anew")]
    url = write_answers(f"file://{tmp_path}/of", records)
    lines = [json.loads(line) for line in (tmp_path / "of/answers.jsonl").open()]
    assert url.endswith("/of/answers.jsonl")
    assert [(line["id"], line["answer"]) for line in lines] == [("1", "anew"), ("2", "told 2")]


def test_places_are_absolute_and_named_by_run_and_stage(tmp_path: Path) -> None:
    here = absolute_paths(job(tmp_path, out="drawn"), tmp_path)
    assert isinstance(here, GenerateSpec) and here.out == f"file://{tmp_path}/drawn"
    assert answers_url(here, "ask-1") == f"file://{tmp_path}/drawn/ask-1"
    there = absolute_paths(job(tmp_path, out="s3://mine/a/"), tmp_path)
    assert answers_url(there, "ask-1") == "s3://mine/a/ask-1"
    plain = absolute_paths(job(tmp_path), tmp_path)
    assert answers_url(plain, "ask-1", "4k") == f"file://{tmp_path}/ask-1/answers/4k"


def test_a_model_that_cannot_answer_is_refused_when_the_job_is_handed_in(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"model = 'a-1': no run or job 'a-1'"):
        settled_model(job(tmp_path), tmp_path)
    tiny = write_folder(tmp_path / "tiny")
    asked = job(tmp_path, model=str(tiny), answer_tokens=40)
    assert settled_model(asked, tmp_path) == asked
    with pytest.raises(PlatformError, match="answer_tokens: 40 tokens leave no room"):
        settled_model(asked.model_copy(update={"context_length": 32}), tmp_path)
    shutil.rmtree(tiny / "ringworld" / "codebook")
    settled_model(asked, tmp_path)
    with pytest.raises(PlatformError, match="codebook: that of .* and to: image needs it"):
        settled_model(asked.model_copy(update={"to": "image"}), tmp_path)
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(PlatformError, match="tokenizer: the text tokenizer of .* not at hand"):
        settled_model(asked, tmp_path)


def test_no_stage_is_shown_of_a_job_that_has_none() -> None:
    progress: Any = SimpleNamespace(spec={"kind": "generate"}, status={"num_stages": 1}, stages={})
    assert stage_lines(progress, 80) == []
