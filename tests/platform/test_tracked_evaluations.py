"""What an evaluation has found, on MLflow: its scores, its answers, and the heat map of needles."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mini_jobs import mini_job

from ringworld_jobs.any_job import Job
from ringworld_jobs.eval_spec import EvalSpec
from ringworld_jobs.spec import JobSpec
from ringworld_platform.evaluation_part import EvaluationPart, asked_of_job, asked_of_stage
from ringworld_platform.evaluation_records import answers_file
from ringworld_platform.live_run import LiveRun, claim
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord, RunState
from ringworld_platform.run_states import RunStates
from ringworld_platform.tracked_run import TrackedRun
from ringworld_platform.tracking import Tracker, tracking_uri

DEADLINE_SECONDS = 120.0


def stage_job(folder: Path) -> JobSpec:
    data = mini_job(folder).model_dump(mode="json", exclude_none=True)
    data["stages"][0]["evaluate"] = ["needle"]
    data["tracking"] = {"mlflow": "auto"}
    return JobSpec.model_validate(data)


def evaluate_job(folder: Path) -> EvalSpec:
    store = {"store": f"file://{folder}"}
    about = {"kind": "eval", "name": "asked", "model": "mini-1/1k", "evaluate": ["needle"]}
    return EvalSpec.model_validate({**about, "checkpoint": store})


def live_of(spec: Job, root: Path) -> LiveRun:
    states = RunStates(root)
    facts = {"spec_digest": "d", "num_stages": len(spec.stages), "attempt": 1}
    made = states.create(
        spec.name,
        lambda run_id, path: JobRecord(job=spec.name, run_id=run_id, run_folder=str(path), **facts),
    )
    folder = RunFolder(Path(made.run_folder))
    folder.open(f"kind: {spec.kind}\n")
    return LiveRun(claim(states, made.run_id, "controller"), spec, states, folder)


def answer(stage: str, length: int, depth: float, score: float) -> dict[str, Any]:
    about = {"kind": "answer", "stage": stage, "stage_index": 0, "attempt": 1, "task": "needle"}
    return {**about, "id": f"{length}@{depth}", "length": length, "depth": depth, "score": score}


@pytest.mark.parametrize("make", [stage_job, evaluate_job])
def test_a_needle_evaluation_puts_its_heat_map_and_scores_on_its_run(
    make: Any, tmp_path: Path, empty_mlflow: bytes
) -> None:
    spec = make(tmp_path)
    live = live_of(spec, tmp_path)
    of_stage = isinstance(spec, JobSpec)
    asked = asked_of_stage(live, spec, 0) if of_stage else asked_of_job(live, spec)
    live.set_state(RunState.RUNNING, "evaluation", stage=asked.stage, stage_index=0)
    answers = [
        answer(asked.stage, length, depth, float(length < 4096 or depth > 0))
        for length in (1024, 4096)
        for depth in (0.0, 100.0)
    ]
    live.folder.append_answers(answers_file(0, asked.stage), answers)
    figures = {"accuracy": 0.75, "accuracy_at_1024": 1.0, "accuracy_at_4096": 0.5}
    found = {"task": "needle", "model": "mini-1/1k/6", "items": 4, "figures": figures}
    EvaluationPart(live, asked).done({"evaluations": [found]})

    run_folder = live.folder.path
    (run_folder / "mlflow.db").write_bytes(empty_mlflow)
    tracker = Tracker(run_folder, spec, live.run_id, pace_seconds=0.05)
    tracker.start()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while tracker.state != "up to date":
        assert time.monotonic() < deadline, (tracker.state, tracker.problem)
        threading.Event().wait(0.02)
    tracker.abandon()
    tracker.join(DEADLINE_SECONDS)

    from mlflow.tracking import MlflowClient

    uri = tracking_uri(spec, run_folder)
    client, saved = MlflowClient(tracking_uri=uri), TrackedRun.load(run_folder, uri)
    child = client.get_run(saved.stages["0"])
    assert child.data.tags["mlflow.parentRunId"] == saved.parent
    told = {f"evaluation/needle/{name}": value for name, value in figures.items()}
    assert told.items() <= child.data.metrics.items()
    kept = {item.path for item in client.list_artifacts(child.info.run_id, "evaluations")}
    picture = f"evaluations/00-{asked.stage}-needle.png"
    assert kept == {picture, answers_file(0, asked.stage)}
    drawn = Path(client.download_artifacts(child.info.run_id, picture, str(tmp_path)))
    assert drawn.read_bytes().startswith(b"\x89PNG")
