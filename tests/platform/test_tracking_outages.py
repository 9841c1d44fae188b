"""A real MLflow server that is killed, frozen and begun anew: nothing is lost, nothing twice."""

from __future__ import annotations

import http.server
import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mini_jobs import wait_until
from real_mlflow import RealMlflow, points_of_log, points_of_run
from typer.testing import CliRunner

from ringworld_platform.tracked_run import TrackedRun
from ringworld_platform.tracking import Tracker
from ringworld_platform.tracking_service import TrackingService

Recording = dict[str, Callable[..., Any]]
TWO_STAGES = 55
"""Records of two stages: a proof of parity, a crash, and steps that were done again among them."""
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: bytes) -> Iterator[RealMlflow]:
    made = RealMlflow(tmp_path_factory.mktemp("mlflow"), empty_mlflow)
    yield made
    made.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen server is given up soon."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def made_run(folder: Path, recording: Recording, uri: str) -> Any:
    """The folder of a run, and its spec."""
    folder.mkdir(parents=True)
    spec = recording["spec"](mlflow=uri)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return spec


def assert_all_there(uri: str, folder: Path, records: list[dict[str, Any]]) -> TrackedRun:
    """Every point is on the server exactly once, on the stage's run and on the job's."""
    from mlflow import MlflowClient

    client, saved = MlflowClient(uri), TrackedRun.load(folder, uri)
    for stage, run in [(None, saved.parent), *((int(s), r) for s, r in saved.stages.items())]:
        there = points_of_run(client, run)
        borders = Counter({p: n for p, n in there.items() if p[0].startswith("stage/")})
        assert there - borders == points_of_log(records, stage), stage
        assert set(borders.values()) <= {1}
    found = client.search_runs([saved.experiment_id], filter_string="attributes.status != 'X'")
    assert sorted(run.info.run_id for run in found) == sorted(
        [saved.parent, *saved.stages.values()]
    )
    return saved


def test_a_server_that_is_killed_and_frozen_has_everything_in_the_end(
    tmp_path: Path, server: RealMlflow, recording: Recording, hasty: None
) -> None:
    from mlflow import MlflowClient

    from ringworld_platform.cli import app

    folder = tmp_path / "runs" / "quickstart-1"
    spec = made_run(folder, recording, server.uri)
    records = recording["metrics"]()[:TWO_STAGES]
    log, append = folder / "metrics.jsonl", recording["append"]
    tracker = Tracker(folder, spec, "quickstart-1", pace_seconds=0.05)
    tracker.start()

    # Down at the start.
    append(log, records[:10])
    wait_until(lambda: tracker.state == "unreachable", "nothing listens yet")
    assert tracker.problem == "nothing listens there (connection refused)"
    server.start()
    wait_until(lambda: tracker.state == "up to date", "it is up", 240)
    server.wait()
    assert_all_there(server.uri, folder, records[:10])

    # Frozen in the middle: it takes connections, and answers long after it was given up.
    server.send(signal.SIGSTOP)
    append(log, records[10:30])
    wait_until(lambda: tracker.state == "unreachable", "it is frozen", 120)
    assert tracker.problem == "it does not answer (timed out)"
    server.send(signal.SIGCONT)
    wait_until(lambda: tracker.state == "up to date", "it goes on", 240)
    assert_all_there(server.uri, folder, records[:30])

    # Killed with a piece on its way.
    append(log, records[30:50])
    server.kill()
    wait_until(lambda: tracker.state == "unreachable", "it is dead", 120)
    server.start()
    wait_until(lambda: tracker.state == "up to date", "it lives again", 240)
    first = assert_all_there(server.uri, folder, records[:50])

    # Killed until after the run's end, and begun anew with nothing.
    server.kill()
    append(log, records[50:])
    assert not tracker.finish("SUCCEEDED", timeout_seconds=0.5)
    tracker.abandon()
    server.empty()
    server.start()
    server.wait()
    (folder / "state.json").write_text(json.dumps(recording["status"](folder)))
    arguments = ["track", "quickstart-1", "--runs", str(tmp_path / "runs")]
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert f"MLflow at {server.uri} has all of quickstart-1" in result.output
    saved = assert_all_there(server.uri, folder, records)
    assert saved.key == first.key and saved.parent != first.parent
    client = MlflowClient(server.uri)
    for run in (saved.parent, *saved.stages.values()):
        assert client.get_run(run).info.status == "FINISHED"
        assert "plots" in [item.path for item in client.list_artifacts(run)]
    parent = client.get_run(saved.parent)
    assert parent.data.tags["attempt"] == "2" and len(parent.data.params) > 50
    assert parent.info.start_time == int(records[0]["time"] * 1000)
    assert parent.info.end_time == int(records[-1]["time"] * 1000)
    versions = client.search_model_versions("name = 'quickstart'")
    assert sorted(v.tags["context_length"] for v in versions) == ["4096", "8192"]
    by_stage = {v.tags["stage"]: v for v in versions}
    about = by_stage["8k"].tags
    assert about["checkpoint"].endswith("runs/quickstart-1/checkpoints/01-8k/step-00000020")
    assert (about["rope_theta"], about["tokens"], about["step"]) == ("5e+06", "655360", "20")
    assert by_stage["8k"].run_id == saved.stages["1"]
    assert client.get_model_version_by_alias("quickstart", "latest-8Ki").tags["stage"] == "8k"


class Locked(http.server.BaseHTTPRequestHandler):
    """Lets nobody in, as MLflow's basic authentication does."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"You are not authenticated. Please see the documentation.")

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_server_that_wants_credentials_is_told_in_a_line(
    tmp_path: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    locked = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked)
    threading.Thread(target=locked.serve_forever, daemon=True).start()
    try:
        uri = f"http://127.0.0.1:{locked.server_address[1]}"
        tracker = Tracker(tmp_path, recording["spec"](mlflow=uri), "quickstart-1")
        tracker.start()
        wait_until(lambda: tracker.problem is not None, "it is not let in")
    finally:
        tracker.abandon()
        locked.shutdown()
        locked.server_close()
    assert "it wants credentials; set MLFLOW_TRACKING_TOKEN" in (tracker.problem or "")
    assert "\n" not in (tracker.problem or "") and "hunter2" not in caplog.text


def test_the_process_that_tracks_makes_way_for_another_and_ends_with_its_controller(
    tmp_path: Path, recording: Recording, empty_mlflow: bytes
) -> None:
    from mlflow import MlflowClient

    folder, short = tmp_path / "quickstart-1", tmp_path / "quickstart-2"
    spec, records = made_run(folder, recording, "auto"), recording["metrics"]()[:20]
    made_run(short, recording, "auto")
    for each in (folder, short):
        (each / "mlflow.db").write_bytes(empty_mlflow)
    uri, log = f"sqlite:///{folder / 'mlflow.db'}", folder / "metrics.jsonl"

    def all_sent() -> bool:
        return TrackedRun.load(folder, uri).offset == log.stat().st_size

    service = TrackingService(restart_seconds=0.1, runs_a_process=1)
    try:
        recording["append"](log, records[:10])
        job, other = (service.track(f, spec, f.name) for f in (folder, short))
        first = service.process
        wait_until(all_sent, "it has sent what there was", 120)
        service.end(other, "STOPPED")
        assert other.ended.wait(120)
        assert first is not None and first.wait(60) == 0
        recording["append"](log, records[10:])
        wait_until(all_sent, "another one has sent the rest", 120)
        wait_until(lambda: job.state == "up to date", "it says so")
        second = service.process
        assert second is not None and second is not first
        second.kill()
        wait_until(lambda: service.process not in (None, second), "it is started again", 60)
        third = service.process
    finally:
        service.close()
    assert third is not None
    third.wait(60)
    client, saved = MlflowClient(uri), TrackedRun.load(folder, uri)
    there = points_of_run(client, saved.stages["0"])
    assert there == points_of_log(records, 0)
