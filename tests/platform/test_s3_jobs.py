"""Jobs whose checkpoints go to S3, up to the moment they start: refusals, and who gets which id."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ringworld_jobs.spec import JobSpec
from ringworld_platform import doctor, head
from ringworld_platform.capacity import Cluster, NodeRoom
from ringworld_platform.cli import app
from ringworld_platform.controller import Controller, ControllerConfig
from ringworld_platform.errors import PlatformError, StoreRefused
from ringworld_platform.head import answers
from ringworld_platform.local_s3 import LOOPBACK, LocalS3
from ringworld_platform.room import Room
from ringworld_platform.run_claims import CLAIM_FILE, RunClaims, checkpoints_url
from ringworld_platform.run_state import JobRecord, RunState
from ringworld_platform.run_states import RunStates
from ringworld_platform.runner_config import RunnerConfig
from ringworld_workers.store.opening import open_store

pytestmark = pytest.mark.timeout(300)

READER = {"accessKey": "reader", "secretKey": "reader-secret-1234"}
WRONG_SECRET = "wrong-secret-0123456789"
# How each way to be refused is brought about, and what must be said of it.
REFUSALS: dict[str, tuple[str, dict[str, str], str]] = {
    "no bucket": ("s3://nowhere/x", {}, "there is no bucket nowhere"),
    "wrong credentials": (
        "s3://runs/x",
        {"AWS_SECRET_ACCESS_KEY": WRONG_SECRET},
        "does not accept the credentials",
    ),
    "no server": (
        "s3://runs/x",
        {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"},
        "nothing answers there",
    ),
    "read-only": (
        "s3://runs/x",
        {
            "AWS_ACCESS_KEY_ID": READER["accessKey"],
            "AWS_SECRET_ACCESS_KEY": READER["secretKey"],
        },
        "access denied",
    ),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A server that also knows somebody who may only read."""
    folder = tmp_path_factory.mktemp("s3")
    own = {"accessKey": "writer", "secretKey": "writer-secret-1234"}
    identities = [
        {"name": "w", "credentials": [own], "actions": ["Admin", "Read", "Write", "List"]},
        {"name": "r", "credentials": [READER], "actions": ["Read", "List"]},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    with LocalS3(folder) as made:
        made.start("runs")
        yield made


@pytest.fixture(autouse=True)
def environment(server: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(head, "find_running", lambda: None)
    monkeypatch.chdir(tmp_path)


def spec_of(store: str, name: str = "cloud") -> JobSpec:
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": name,
            "data": {"sources": {"x": {"shards": "x"}}},
            "checkpoint": {"store": store},
            "resources": {"accelerator": "cpu"},
            "stages": [
                {
                    "name": "a",
                    "context_length": "1Ki",
                    "rope_theta": 1e4,
                    "steps": 1,
                    "global_batch_tokens": "1Ki",
                    "mixture": {"x": 1.0},
                    "learning_rate": {"peak": 1e-3},
                }
            ],
        }
    )


def controller(folder: Path) -> Controller:
    """One in this process. Before a run starts, it needs of Ray only to know the nodes."""
    config = ControllerConfig("test", str(folder), RunnerConfig(one_shot=True))
    made = Controller(config)
    room = Room(2, 0)
    made._cluster = lambda: Cluster({"here": NodeRoom(room, room)}, {})
    return made


def record_of(job: str, run_id: str, path: Path, uid: str) -> JobRecord:
    about: dict[str, Any] = {"job": job, "run_id": run_id, "run_folder": str(path)}
    return JobRecord(**about, num_stages=1, spec_digest="d", uid=uid, submitted=time.time())


@pytest.mark.parametrize("how", REFUSALS)
def test_a_store_that_takes_nothing_is_refused_and_leaves_nothing(
    how: str, server: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, changes, words = REFUSALS[how]
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert not answers(LOOPBACK, 9)
    began = time.monotonic()
    with pytest.raises(StoreRefused) as refused:
        controller(tmp_path / "runs").submit(
            spec_of(store).model_dump(mode="json", exclude_none=True), str(tmp_path / "runs")
        )
    assert time.monotonic() - began < 60, "not for as long as a store's outage is waited for"
    said = str(refused.value)
    assert said.startswith(f"checkpoint.store {store} cannot be used: ") and words in said
    assert "\n" not in said and WRONG_SECRET not in said
    assert list(tmp_path.iterdir()) == []
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    assert open_store("s3://runs").list() == []


def test_the_command_refuses_before_ray_starts(tmp_path: Path) -> None:
    from ringworld_jobs.resolve import resolved_yaml

    (tmp_path / "x").mkdir()
    (tmp_path / "x/meta.json").write_text("{}")
    job = tmp_path / "job.yaml"
    job.write_text(resolved_yaml(spec_of("s3://nowhere/x")))
    offline = CliRunner().invoke(app, ["validate", str(job)])
    assert offline.exit_code == 0, "it does not ask"
    result = CliRunner().invoke(app, ["run", str(job)])
    assert result.exit_code == 2
    assert "checkpoint.store s3://nowhere/x cannot be used: " in result.output
    assert "there is no bucket nowhere" in result.output
    assert "nothing was started" in result.output
    assert "starting Ray" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml", "x"]


def test_resume_tries_the_store_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ringworld_jobs.resolve import resolved_yaml

    spec = spec_of("s3://runs/held")
    states = RunStates(tmp_path / "runs")
    made = states.create("cloud", lambda run, path: record_of("cloud", run, path, "uid"))
    states.update(made.run_id, lambda found: found.model_copy(update={"state": RunState.STOPPED}))
    (Path(made.run_folder) / "spec.yaml").write_text(resolved_yaml(spec))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert not answers(LOOPBACK, 9)
    result = CliRunner().invoke(app, ["resume", "cloud", "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert "checkpoint.store s3://runs/held cannot be used: " in result.output
    assert "nothing answers there" in result.output
    assert "starting Ray" not in result.output
    assert states.get(made.run_id).state is RunState.STOPPED


def test_doctor_tries_the_store() -> None:
    sound, absent = (doctor._store(spec_of(f"s3://{bucket}/x")) for bucket in ("runs", "nowhere"))
    assert not sound.problem and "written, read and removed" in sound.value
    assert "there is no bucket nowhere" in absent.problem
    assert open_store("s3://runs").list() == []


def test_machines_that_share_a_bucket_get_ids_of_their_own(tmp_path: Path) -> None:
    spec = spec_of("s3://runs/race")

    def create(machine: int) -> JobRecord:
        def record(run_id: str, path: Path) -> JobRecord:
            return record_of("cloud", run_id, path, f"uid-{machine}")

        states = RunStates(tmp_path / f"machine-{machine}")
        return states.create("cloud", record, RunClaims(spec))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(create, range(4)))
    ids = {record.run_id for record in made}
    assert len(ids) == 4
    store = open_store("s3://runs/race")
    for record in made:
        claim = json.loads(store.get(f"{record.run_id}/{CLAIM_FILE}"))
        assert (claim["uid"], claim["job"], claim["format"]) == (
            *(record.uid, "cloud"),
            "ringworld-run",
        )
    # The next one starts behind them all, whatever this machine's own folder holds.
    assert create(9).run_id == f"cloud-{RunClaims(spec).highest('cloud')}"
    assert RunClaims(spec).highest("clou") == 0


def test_a_run_that_cannot_be_kept_here_gives_its_id_back(tmp_path: Path) -> None:
    spec = spec_of("s3://runs/back")
    (tmp_path / "runs/cloud-1").mkdir(parents=True)
    (tmp_path / "runs/cloud-1/logs").write_text("a file in the way of the logs")
    with pytest.raises(PlatformError, match="cannot write the run folder"):
        controller(tmp_path / "runs").submit(
            spec.model_dump(mode="json", exclude_none=True), str(tmp_path / "runs")
        )
    assert open_store("s3://runs/back").list() == []
    assert RunStates(tmp_path / "runs").all() == []


def test_a_runs_folder_is_its_owners_alone(tmp_path: Path) -> None:
    from ringworld_platform.run_folder import RunFolder

    folder = RunFolder(tmp_path / "runs/cloud-1")
    folder.open("kind: train\n")
    folder.close()
    assert stat.S_IMODE((tmp_path / "runs/cloud-1").stat().st_mode) == 0o700
    assert checkpoints_url(spec_of("s3://b0b/x/"), "cloud-1") == "s3://b0b/x/cloud-1/checkpoints"
