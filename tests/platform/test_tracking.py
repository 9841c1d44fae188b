"""Tracking on a real sqlite store: nothing lost, nothing twice, never in the way."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ringworld_platform import head
from ringworld_platform.cli import app
from ringworld_platform.tracked_run import IDS_FILE, TrackedRun, flatten
from ringworld_platform.tracking import LOCK_FILE, Tracker

Recording = dict[str, Callable[..., Any]]
DEADLINE_SECONDS = 120.0
FIRST_STAGE = 24
"""Records of the first stage but its end, at which curves are drawn."""
TWO_STAGES = 55
"""Records of two stages: a proof of parity, a crash, and steps that were done again among them."""


@pytest.fixture
def run_folder(tmp_path: Path, empty_mlflow: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "quickstart-1"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_mlflow)
    working = tmp_path / "cwd"
    working.mkdir()
    monkeypatch.chdir(working)
    return folder


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        threading.Event().wait(0.02)


def send_all(folder: Path, recording: Recording) -> Tracker:
    """Send what there is, and no end: the report of a run takes seconds."""
    tracker = Tracker(folder, recording["spec"](), "quickstart-1", pace_seconds=0.05)
    tracker.start()
    wait_for(lambda: tracker.state == "up to date")
    tracker.abandon()
    tracker.join(DEADLINE_SECONDS)
    return tracker


def client_of(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def series(folder: Path, run: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client_of(folder).get_metric_history(run, name)]


def expected(records: list[dict[str, Any]], name: str, stage: int | None) -> list[Any]:
    return sorted(
        (record["global_step"], record[name])
        for record in records
        if record["kind"] == "step" and stage in (None, record["stage_index"])
    )


def test_every_point_arrives_once_and_files_are_kept(
    run_folder: Path, recording: Recording, tmp_path: Path
) -> None:
    records = recording["metrics"]()[:TWO_STAGES]
    recording["append"](run_folder / "metrics.jsonl", records)
    (run_folder / "spec.yaml").write_text("kind: train\n")
    (run_folder / "report.html").write_text("<p>report</p>")
    (run_folder / "plots").mkdir()
    (run_folder / "plots" / "loss.png").write_bytes(b"png")
    tracker = Tracker(run_folder, recording["spec"](), "quickstart-1", pace_seconds=0.05)
    tracker.start()
    assert tracker.finish("SUCCEEDED", timeout_seconds=DEADLINE_SECONDS), tracker.problem
    assert (tracker.state, tracker.dropped) == ("ended", 0)

    saved = TrackedRun.load(run_folder, f"sqlite:///{run_folder / 'mlflow.db'}")
    assert sorted(series(run_folder, saved.parent, "loss")) == expected(records, "loss", None)
    for stage in range(2):
        child = saved.stages[str(stage)]
        for name in ("loss_text", "ring_wait_seconds", "ring_compute_max_seconds"):
            assert sorted(series(run_folder, child, name)) == expected(records, name, stage)
        assert series(run_folder, child, "validation/loss_text") == [
            (20 * (stage + 1), 3.1 - 0.2 * stage)
        ]
        run = client_of(run_folder).get_run(child)
        assert run.data.tags["mlflow.parentRunId"] == saved.parent
        assert run.info.status == "FINISHED"
        assert run.data.tags.get("parity") == ("passed" if stage == 1 else None)
    assert series(run_folder, saved.stages["1"], "parity/gradient_error") == [(20, 3.4e-7)]
    parent = client_of(run_folder).get_run(saved.parent)
    assert parent.info.run_name == "quickstart-1"
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["attempt"] == "2"
    assert parent.data.params["stages.1.context_length"] == "8Ki"
    assert parent.data.params["data.sources.books.shards"] == "books"
    artifacts = {item.path for item in client_of(run_folder).list_artifacts(saved.parent)}
    assert artifacts == {"spec.yaml", "report.html", "plots"}
    assert (run_folder / "mlflow-artifacts").is_dir()
    versions = client_of(run_folder).search_model_versions("name = 'quickstart'")
    sources = sorted(version.source for version in versions)
    assert [source.rpartition("/checkpoints/")[2] for source in sources] == [
        "00-4k/step-00000020",
        "01-8k/step-00000020",
    ]
    assert all(source.startswith("file:///") for source in sources)
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize("acknowledged", [True, False])
def test_a_restart_goes_on_with_the_same_runs(
    run_folder: Path, recording: Recording, acknowledged: bool
) -> None:
    records = recording["metrics"]()[:FIRST_STAGE]
    log = run_folder / "metrics.jsonl"
    recording["append"](log, records[:10])
    send_all(run_folder, recording)
    uri = f"sqlite:///{run_folder / 'mlflow.db'}"
    before = TrackedRun.load(run_folder, uri)
    if not acknowledged:  # died after the server had the points, before it saved the position
        forgotten = TrackedRun(key=before.key, uri=uri)
        forgotten.save(run_folder)

    recording["append"](log, records[10:])
    send_all(run_folder, recording)
    after = TrackedRun.load(run_folder, uri)
    assert after.parent == before.parent
    assert after.stages["0"] == before.stages["0"]
    assert sorted(series(run_folder, after.parent, "loss")) == expected(records, "loss", None)
    runs = client_of(run_folder).search_runs([after.experiment_id])
    assert len(runs) == 2


def test_a_log_that_is_another_one_is_sent_whole(run_folder: Path, recording: Recording) -> None:
    """A run that was taken over from a lost machine may lack that machine's last lines."""
    records = recording["metrics"]()[:FIRST_STAGE]
    log = run_folder / "metrics.jsonl"
    recording["append"](log, records[:12])
    send_all(run_folder, recording)
    log.unlink()
    others = [{**record, "loss": 1.0} for record in records[9:]]
    recording["append"](log, records[:9] + others)
    send_all(run_folder, recording)
    saved = TrackedRun.load(run_folder, f"sqlite:///{run_folder / 'mlflow.db'}")
    lost = [record for record in records[9:12] if record["kind"] == "step"]
    found = expected(records[:9] + others + lost, "loss", None)
    assert sorted(series(run_folder, saved.parent, "loss")) == found


def test_an_outage_is_a_gap_that_is_filled(run_folder: Path, recording: Recording) -> None:
    records = recording["metrics"]()[:FIRST_STAGE]
    database = run_folder / "mlflow.db"
    usable = database.read_bytes()
    database.write_bytes(b"this is no database" * 100)
    log = run_folder / "metrics.jsonl"
    tracker = Tracker(run_folder, recording["spec"](), "quickstart-1", pace_seconds=0.05)
    tracker.start()
    recording["append"](log, records[:10])
    wait_for(lambda: tracker.state == "unreachable")
    assert "not a database" in (tracker.problem or "")
    recording["append"](log, records[10:])
    database.write_bytes(usable)
    wait_for(lambda: tracker.state == "up to date")
    tracker.abandon()
    saved = TrackedRun.load(run_folder, f"sqlite:///{database}")
    assert sorted(series(run_folder, saved.parent, "loss")) == expected(records, "loss", None)


def test_an_evaluation_is_sent_with_its_pictures_and_what_is_refused_is_left_out(
    run_folder: Path, recording: Recording
) -> None:
    records = recording["metrics"]()[:5]
    picture = run_folder / "evaluations" / "00-4k" / "needle.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"png")
    found = {"accuracy": 0.5, "by_length": {"4Ki": 1.0}, "above/../all": 3.0, "50 % deep": 0.25}
    names = ["evaluations/00-4k/needle.png", "../secret", "lost.png"]
    about = {"kind": "evaluation", "task": "needle", "files": names}
    recording["append"](run_folder / "metrics.jsonl", [*records, {**records[-1], **about, **found}])
    tracker = send_all(run_folder, recording)
    assert tracker.dropped == 2  # of the stage's run, and of the job's
    saved = TrackedRun.load(run_folder, f"sqlite:///{run_folder / 'mlflow.db'}")
    child = saved.stages["0"]
    assert series(run_folder, child, "evaluation/needle/accuracy") == [(4, 0.5)]
    assert series(run_folder, child, "evaluation/needle/by_length/4Ki") == [(4, 1.0)]
    assert series(run_folder, child, "evaluation/needle/50 _ deep") == [(4, 0.25)]
    assert series(run_folder, child, "loss") == expected(records, "loss", 0)
    client = client_of(run_folder)
    kept = [item.path for item in client.list_artifacts(child, "evaluations/00-4k")]
    assert kept == ["evaluations/00-4k/needle.png"]
    assert [item.path for item in client.list_artifacts(child)] == ["evaluations"]


def test_a_run_that_sends_by_itself_is_left_to_it(
    recorded_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "find_running", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    state = recorded_run / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "state": "RUNNING"}))
    arguments = ["track", "--runs", str(recorded_run.parent), "--timeout", "60"]
    with (recorded_run / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "is at work, and sends by itself" in done.output
    done = CliRunner().invoke(app, [*arguments, "--to", "http://me:hunter2@mlflow:5000"])
    assert done.exit_code == 2 and "MLFLOW_TRACKING_PASSWORD" in done.output
    assert "hunter2" not in done.output
    assert not (recorded_run / IDS_FILE).exists()


def test_off_starts_no_thread(tmp_path: Path, recording: Recording) -> None:
    tracker = Tracker(tmp_path, recording["spec"](mlflow="off"), "quickstart-1")
    tracker.start()
    assert tracker.state == "off"
    assert tracker.finish("SUCCEEDED")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_line_costs_itself_only(run_folder: Path, recording: Recording) -> None:
    records = recording["metrics"]()[:4]
    log = run_folder / "metrics.jsonl"
    recording["append"](log, records[:2])
    with log.open("a") as file:
        file.write('{"kind": "step", "loss"\n')
    recording["append"](log, records[2:])
    tracker = send_all(run_folder, recording)
    assert tracker.dropped == 1
    saved = TrackedRun.load(run_folder, f"sqlite:///{run_folder / 'mlflow.db'}")
    assert sorted(series(run_folder, saved.parent, "loss")) == expected(records, "loss", None)


def test_settings_of_the_user_win(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringworld_platform.mlflow_server import MlflowServer

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    MlflowServer(f"sqlite:///{run_folder / 'mlflow.db'}")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_flatten_names_every_leaf_and_cuts_long_ones() -> None:
    flat = flatten({"a": {"b": [1, 2]}, "c": [{"d": None}], "e": "x" * 9000})
    assert flat["a.b"] == "[1, 2]"
    assert flat["c.0.d"] == "None"
    assert len(flat["e"]) <= 500
