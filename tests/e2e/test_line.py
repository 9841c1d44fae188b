"""The whole line through the command: a run, and one that loses a worker and is interrupted.

Both train the same job; what a user relies on is that they end alike.
"""

from __future__ import annotations

import json
import os
import re
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Project

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_STEPS = {"first": 8, "second": 80, "third": 6}
STEPS = [(stage, step + 1) for stage, count in NUM_STEPS.items() for step in range(count)]


@pytest.fixture(scope="module")
def undisturbed(project: Project) -> tuple[Project, str]:
    """A run to its end, which the other is compared with."""
    code, output = project.command("run", "job.yaml")
    assert code == 0, output
    assert "small-1" in output
    return project, output


def assert_same_training(project: Project, run_id: str) -> None:
    """The run's steps saw the samples of the undisturbed run and ended with its losses."""
    assert project.samples(run_id) == project.samples("small-1")
    expected, found = project.steps("small-1"), project.steps(run_id)
    assert sorted(found) == sorted(STEPS)
    for key, record in expected.items():
        assert found[key]["loss"] == pytest.approx(record["loss"], abs=1e-6), key
    assert scores(project, run_id) == pytest.approx(scores(project, "small-1"), abs=1e-6)


def scores(project: Project, run_id: str) -> dict[str, float]:
    """The held-out losses at the end of the last stage."""
    records = project.lines(run_id, "metrics.jsonl")
    last = [record for record in records if record["kind"] == "validation"][-1]
    return {name: last[name] for name in ("loss_text", "loss_vision")}


def test_stages_start_from_the_committed_end_of_the_one_before(
    undisturbed: tuple[Project, str],
) -> None:
    project, _ = undisturbed
    run = project.folder / "runs" / "small-1"
    records = project.lines("small-1", "metrics.jsonl")
    starts = {r["stage"]: r for r in records if r["kind"] == "stage_start"}
    ends = {r["stage"]: r["checkpoint"] for r in records if r["kind"] == "stage_end"}
    assert starts["first"]["resumed_from"] is None
    assert starts["second"]["resumed_from"] == ends["first"] == "00-first/step-00000008"
    assert starts["third"]["resumed_from"] == ends["second"] == "01-second/step-00000080"
    meshes = [(starts[s]["ring_size"], starts[s]["heads_size"]) for s in NUM_STEPS]
    assert meshes == [(1, 1), (2, 1), (1, 2)]
    for key in ends.values():
        manifest = json.loads((run / "checkpoints" / key / "manifest.json").read_text())
        assert manifest["state"]["final"] is True
        for stored in manifest["objects"]:
            assert (run / "checkpoints" / key / stored["name"]).stat().st_size == stored["size"]


def test_the_run_folder_holds_report_spec_and_metrics(undisturbed: tuple[Project, str]) -> None:
    project, output = undisturbed
    run = project.folder / "runs" / "small-1"
    assert "succeeded" in output and "report.html" in output
    html = (run / "report.html").read_text()
    assert html.count("data:image/svg+xml;base64") >= 4
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html), "one file, nothing fetched"
    assert "rope_theta" in (run / "spec.yaml").read_text()
    assert sorted(project.steps("small-1")) == sorted(STEPS)
    status = project.status("small-1")
    assert status["state"] == "SUCCEEDED" and status["attempt"] == 1
    assert status["checkpoint"] == "02-third/step-00000006"


def test_a_stage_is_exported_and_another_job_starts_from_it(
    undisturbed: tuple[Project, str],
) -> None:
    from ringworld_jobs.load import load_job
    from ringworld_model.hf import from_pretrained
    from ringworld_workers.data.tokenizer import load_tokenizer

    project, _ = undisturbed
    code, shown = project.command("export", "small/second", "--to", "weights")
    assert code == 0, shown
    assert "small-1 01-second/step-00000080" in shown and "ringworld/vision.safetensors" in shown
    folder = project.folder / "weights"
    model, about = from_pretrained(folder), json.loads((folder / "config.json").read_text())
    assert (model.rope_theta, about["max_position_embeddings"]) == (1e5, 640)
    tokenizer = load_tokenizer(folder)
    assert about["bos_token_id"] == tokenizer.bos_id and about["eos_token_id"] == tokenizer.eos_id
    text = (project.folder / "job.yaml").read_text()
    start = text.index("model:")
    job = project.folder / "warm.yaml"
    model_line = 'model: {init_from: "hf:weights"}'
    job.write_text(text[:start] + model_line + text[text.index("\n", start) :])
    assert load_job(job).model.config() == model.config


def test_mlflow_has_the_job_and_a_child_per_stage(undisturbed: tuple[Project, str]) -> None:
    from mlflow import MlflowClient

    project, _ = undisturbed
    client = MlflowClient(f"sqlite:///{project.folder}/runs/small-1/mlflow.db")
    found = [
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
    ]
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1 and len(children) == len(NUM_STEPS)
    history = client.get_metric_history(parents[0].info.run_id, "loss")
    losses = {point.step: point.value for point in history}
    expected = [record["loss"] for record in project.steps("small-1").values()]
    assert [losses[step + 1] for step in range(len(STEPS))] == pytest.approx(expected)


def test_a_stage_that_asks_for_it_has_proved_its_ring(undisturbed: tuple[Project, str]) -> None:
    project, output = undisturbed
    assert "stage second: the ring gives one worker's loss and gradients" in output
    records = [r for r in project.lines("small-1", "metrics.jsonl") if r["kind"] == "parity"]
    assert [(r["stage"], r["ring_size"], r["passed"]) for r in records] == [("second", 2, True)]
    proofs = json.loads((project.folder / "runs" / "small-1" / "parity.json").read_text())
    assert proofs["stages"]["second"]["preflight"]["passed"] is True
    assert "<h2>Parity</h2>" in (project.folder / "runs" / "small-1" / "report.html").read_text()
    code, shown = project.command("status", "small-1")
    assert code == 0 and "stage second passed" in shown


def test_the_ring_is_measured_on_all_workers(undisturbed: tuple[Project, str]) -> None:
    project, _ = undisturbed
    for (stage, _), step in project.steps("small-1").items():
        for name in ("ring_compute", "ring_wait"):
            assert 0 <= step[f"{name}_seconds"] <= step[f"{name}_max_seconds"]
        assert 0 < step["ring_compute_max_seconds"] < step["step_seconds"]
        assert (step["ring_bytes_sent"] > 0) == (stage != "first"), "a ring of one sends nothing"
        assert step["ring_slowest_rank"] in (0, 1)


def test_a_rank_says_where_in_the_run_it_is(undisturbed: tuple[Project, str]) -> None:
    project, _ = undisturbed
    asked = ("logs", "small-1", "--rank", "1", "--stage", "second", "--grep", "ring compute")
    code, shown = project.command(*asked, "--json")
    assert code == 0, shown
    first = json.loads(shown[shown.index("{") :].splitlines()[0])
    assert (first["rank"], first["stage"], first["step"], first["attempt"]) == (1, "second", 1, 1)
    assert first["level"] == "INFO" and first["node"] and first["time"] > 1e9
    code, shown = project.command("events", "small-1", "--kind", "checkpoint", "--json")
    saved = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert saved and {event["stage"] for event in saved} == set(NUM_STEPS)


def test_each_stage_is_compared_with_its_prediction(undisturbed: tuple[Project, str]) -> None:
    project, output = undisturbed
    events = [e for e in project.lines("small-1", "events.jsonl") if e["kind"] == "plan"]
    assert [event["stage"] for event in events] == list(NUM_STEPS)
    for event in events:
        assert event["text"] in output
        # How long a step takes depends on what else the machine does.
        assert 0 < event["predicted_step_seconds"] < 10 * event["step_seconds"]
        assert event["memory_bytes"] == pytest.approx(event["predicted_memory_bytes"], rel=0.15)
    code, shown = project.command("status", "small-1")
    assert code == 0 and events[-1]["text"] in " ".join(shown.split())
    report = (project.folder / "runs" / "small-1" / "report.html").read_text()
    assert "<h2>Predicted and measured</h2>" in report


def test_prepared_data_is_found_again(undisturbed: tuple[Project, str]) -> None:
    project, output = undisturbed
    assert "built in" in output
    code, again = project.command("data", "build", "recipe.yaml", "--cache", "cache")
    assert code == 0 and "cache" in again
    assert len([p for p in (project.folder / "cache").iterdir() if p.is_dir()]) == 1


def test_a_killed_worker_and_an_interrupt_change_nothing(undisturbed: tuple[Project, str]) -> None:
    project, _ = undisturbed
    process = project.start("run", "job.yaml")
    pid = project.wait_for_pid("small-2", "second", rank=1)
    project.wait_for_step("small-2", "second", 15)
    os.kill(pid, signal.SIGKILL)

    def goes_on() -> bool:
        record = project.steps("small-2").get(("second", 40))
        return record is not None and record["attempt"] == 2

    rank = project.wait_for_pid("small-2", "second", rank=1, attempt=2)
    project.wait_for("step 40 of the second attempt", goes_on)
    # However late the stop is heard, the stage does not end before.
    os.kill(rank, signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to every process of the group
    state = project.folder / "runs" / "small-2" / "state.json"
    project.wait_for("STOPPING", lambda: json.loads(state.read_text())["state"] == "STOPPING")
    os.kill(rank, signal.SIGCONT)
    code, output = project.finish(process)
    assert code == 130, output
    assert "ringworld resume small-2" in output
    assert project.processes() == [], "nothing is left behind"
    status = project.status("small-2")
    assert status["state"] == "STOPPED" and status["checkpoint"].startswith("01-second/")
    assert ("third", 1) not in project.steps("small-2")

    code, output = project.command("resume", "small-2")
    assert code == 0, output
    status = project.status("small-2")
    assert status["attempt"] == 3 and status["state"] == "SUCCEEDED"
    records = project.lines("small-2", "metrics.jsonl")
    starts = [(r["attempt"], r["stage"]) for r in records if r.get("resumed_from")]
    assert starts == [(1, "second"), (2, "second"), (3, "second"), (3, "third")], output
    kinds = [record["kind"] for record in records]
    assert kinds.count("parity") == 1, "a resume on the same mesh proves nothing again"
    assert_same_training(project, "small-2")
    assert project.processes() == []
