"""Evaluations in a run's records: answers as they come, figures, limits, and what comes next."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mini_jobs import mini_job

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.spec import JobSpec
from ringworld_platform.agenda import Agenda
from ringworld_platform.answer_log import AnswerLog
from ringworld_platform.evaluation_part import (
    EvaluationPart,
    asked_of_stage,
    fitting,
    refuse_missed,
)
from ringworld_platform.evaluation_records import (
    answers_file,
    evaluation_lines,
    read_answers,
    read_figures,
)
from ringworld_platform.job_ends import JobFailed
from ringworld_platform.live_run import LiveRun, claim
from ringworld_platform.report import write_report
from ringworld_platform.run_changes import fresh_start
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_parts import logs_in, whole_files
from ringworld_platform.run_records import METRICS_FILE, read_lines
from ringworld_platform.run_state import JobRecord, RunState
from ringworld_platform.run_states import RunStates
from ringworld_platform.training_part import TrainingPart

LOSSES = {128: 3.0, 256: 2.5}


@pytest.fixture
def make_live(tmp_path: Path) -> Callable[..., LiveRun]:
    """A run whose first stage is trained, and asks for what is given."""

    def make(**evaluate: Any) -> LiveRun:
        data = mini_job(tmp_path).model_dump(mode="json", exclude_none=True)
        data["stages"][0]["evaluate"] = evaluate
        spec = JobSpec.model_validate(data)
        states = RunStates(tmp_path)
        facts = {"spec_digest": "d", "num_stages": 2, "attempt": 1, "stages_done": 1}
        made = states.create(
            "mini",
            lambda run_id, path: JobRecord(
                job="mini", run_id=run_id, run_folder=str(path), **facts
            ),
        )
        folder = RunFolder(Path(made.run_folder))
        folder.open("kind: train\n")
        live = LiveRun(claim(states, made.run_id, "controller"), spec, states, folder)
        live.set_state(RunState.RUNNING, "evaluation of 1k", stage="1k", stage_index=0)
        return live

    return make


def answer(number: int, length: int = 128, **more: Any) -> dict[str, Any]:
    return {
        "kind": "answer",
        "stage": "1k",
        "stage_index": 0,
        "attempt": 1,
        "task": "perplexity",
        "id": f"books/{number}@{length}",
        "length": length,
        "nll": 10.0 * LOSSES[length],
        "weight": 10.0,
        **more,
    }


def result(**figures: float) -> dict[str, Any]:
    losses = {f"loss_at_{length}": loss for length, loss in LOSSES.items()}
    found = {"task": "perplexity", "model": "mini-1/1k/6", "items": 4}
    return {"evaluations": [{**found, "figures": {"loss": 2.5, "gain": 0.5, **losses, **figures}}]}


def part_of(live: LiveRun) -> EvaluationPart:
    assert isinstance(live.spec, JobSpec)
    return EvaluationPart(live, asked_of_stage(live, live.spec, 0))


def test_answers_are_kept_as_they_come_and_counted(make_live: Callable[..., LiveRun]) -> None:
    live = make_live(perplexity={})
    log = AnswerLog(live)
    live.set_fields(restarts=3)
    log.hear([answer(7, task="needle")])  # of a ring that is ahead of what rank 0 has told
    log.begin({"task": "perplexity", "items": 4, "answered": 1})
    assert live.record.reason == "evaluating perplexity 1/4 of 1k" and live.record.restarts == 0
    log.hear([answer(0), answer(1)])
    assert live.record.reason == "evaluating perplexity 3/4 of 1k"
    live.set_state(RunState.STOPPING, "keeps what is answered")
    log.hear([answer(1), answer(2)])
    assert live.record.reason == "keeps what is answered"

    path = live.folder.path / answers_file(0, "1k")
    with path.open("a") as file:
        file.write('{"kind":"answer","id":"torn')  # the controller died here
    RunFolder(live.folder.path).open()
    found = read_answers(live.folder.path, 0, "1k")
    assert [each["id"] for each in found if each["task"] == "perplexity"] == [
        f"books/{number}@128" for number in (0, 1, 2)
    ]
    assert path.read_text().endswith("}\n")

    # The next gang begins with what was answered, and counts its own.
    live.set_state(RunState.RUNNING, "again", attempt=2)
    log.begin({"task": "perplexity", "items": 4, "answered": 3})
    assert live.record.reason == "evaluating perplexity 3/4 of 1k"
    log.hear([answer(3, attempt=2)])
    # So does another stage's, whose attempt has the same number.
    live.set_state(RunState.RUNNING, "evaluation of 2k", stage="2k", stage_index=1)
    log.begin({"task": "perplexity", "items": 4, "answered": 0})
    assert live.record.reason == "evaluating perplexity 0/4 of 2k"


def test_figures_go_to_the_logs_with_a_picture_and_to_the_report(
    make_live: Callable[..., LiveRun],
) -> None:
    live = make_live(perplexity={"max_loss": 2.6})
    live.folder.append_answers(
        answers_file(0, "1k"), [answer(n, length) for n in range(2) for length in LOSSES]
    )
    part_of(live).done(result())
    folder = live.folder.path
    (record,) = [r for r in read_lines(folder / METRICS_FILE).records if r["kind"] == "evaluation"]
    assert (record["task"], record["loss"], record["items"]) == ("perplexity", 2.5, 4)
    assert (record["step"], record["global_step"], record["stage_index"]) == (6, 6, 0)
    picture = "evaluations/00-1k-perplexity.png"
    assert record["files"] == ["evaluations/00-1k.jsonl", picture]
    assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert evaluation_lines(live.folder.events()) == ["perplexity of 1k: loss 2.5 (4 items)"]
    assert [found["loss"] for found in read_figures(folder)] == [2.5]
    assert live.record.evaluated == 1 and live.record.missed == ""
    # Answers travel to the run's store as logs do, pictures as files.
    assert "evaluations/00-1k.jsonl" in logs_in(folder)
    assert picture in whole_files(folder)
    assert "evaluations/00-1k.jsonl" not in whole_files(folder)
    page = write_report(folder).read_text()
    assert "<h2>Evaluations</h2>" in page and "loss_at_128 3" in page and "image/png" in page


def test_a_missed_limit_ends_the_job_until_it_is_resumed(
    make_live: Callable[..., LiveRun],
) -> None:
    live = make_live(perplexity={"max_loss": 2.4, "min_gain": 0.5})
    agenda = Agenda(live, patient=False)
    part = agenda.next()
    assert isinstance(part, EvaluationPart) and part.name == "1k-evaluate"
    with pytest.raises(JobFailed) as caught:
        part.done(result())
    text = str(caught.value)
    assert "evaluate.perplexity.max_loss of 1k: loss must be at most 2.4, and it is 2.5" in text
    assert "min_gain" not in text and f"`ringworld resume {live.run_id}`" in text
    # A controller that comes before the end was told does not go past it.
    stored = live.states.get(live.run_id)
    assert stored.missed and stored.evaluated == 1
    with pytest.raises(JobFailed, match="max_loss"):
        refuse_missed(live)
    live.record = live.states.update(live.run_id, partial(fresh_start, False, "request"))
    refuse_missed(live)
    after = agenda.next()
    assert isinstance(after, TrainingPart) and after.title == "stage 4k"


def test_a_limit_may_only_warn_and_one_without_its_figure_is_missed(
    make_live: Callable[..., LiveRun],
) -> None:
    live = make_live(perplexity={"max_loss": 2.4, "on_missed": "warn"})
    part_of(live).done(result())
    (event,) = [event for event in live.folder.events() if event["kind"] == "gate"]
    assert (event["figure"], event["limit"]) == (2.5, 2.4) and live.record.evaluated == 1
    nothing = result()
    del nothing["evaluations"][0]["figures"]["loss"]
    part_of(live).done(nothing)
    assert "there is no such figure" in live.folder.events()[-1]["text"]
    nan = result(loss=float("nan"))
    part_of(live).done(nan)
    assert "it is nan" in live.folder.events()[-1]["text"]


def test_a_stage_without_evaluations_has_none_to_do(make_live: Callable[..., LiveRun]) -> None:
    live = make_live()
    part = Agenda(live, patient=False).next()
    assert isinstance(part, TrainingPart) and live.record.evaluated == 1


def test_an_evaluation_takes_the_workers_that_there_are() -> None:
    wanted = MeshSize(4, 2)
    assert [fitting(wanted, there) for there in (9, 8, 7, 4, 3, 1, 0)] == [
        MeshSize(4, 2),
        MeshSize(4, 2),
        MeshSize(4, 1),
        MeshSize(4, 1),
        MeshSize(3, 1),
        MeshSize(1, 1),
        MeshSize(4, 2),
    ]


def test_a_broken_line_hides_no_other_answer(tmp_path: Path) -> None:
    path = tmp_path / answers_file(3, "64k")
    path.parent.mkdir()
    lines = [json.dumps(answer(1)), "{broken", json.dumps(answer(2))]
    path.write_text("\n".join(lines) + "\n")
    assert [each["id"] for each in read_answers(tmp_path, 3, "64k")] == [
        "books/1@128",
        "books/2@128",
    ]
