"""A run on S3 whose controller is frozen for longer than its lease, on a real local Ray."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from mini_jobs import LOGGED, hold, mini_cluster, mini_job, wait_until
from rival import Rival

from ringworld_jobs.spec import JobSpec
from ringworld_platform.client import Client, absolute_paths
from ringworld_platform.controller import ControllerConfig
from ringworld_platform.errors import ClusterError, RunConflictError
from ringworld_platform.live_run import this_owner
from ringworld_platform.local_s3 import LocalS3
from ringworld_platform.run_records import effective_steps, read_run
from ringworld_platform.run_state import JobRecord
from ringworld_platform.run_states import RunStates
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.stored_run import StoredRun
from ringworld_workers.checkpoint.fence import Fence
from ringworld_workers.store.opening import open_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

LEASE_SECONDS = 8.0
STEPS = 150
STORE = "s3://runs/takeover"


@pytest.fixture(scope="module")
def client(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.environment().items():
            environment.setenv(name, value)
        with mini_cluster(num_cpus=2):
            root = tmp_path_factory.mktemp("takeover") / "runs"
            config = replace(LOGGED, store_lease_seconds=LEASE_SECONDS)
            made = Client.attach(root, runner=config)
            yield made
            made.shutdown()


def job(folder: Path) -> JobSpec:
    stages = (("1k", 1, STEPS),)
    spec = mini_job(folder, name="moving", stages=stages, step_seconds=0.05, stall_timeout="10min")
    store = spec.checkpoint.model_copy(update={"store": STORE})
    return spec.model_copy(update={"checkpoint": store})


def stored(run: StoredRun) -> JobRecord:
    found = run.read()
    assert found is not None
    return found[0]


def lease_is_over(run: StoredRun) -> bool:
    owner = stored(run).owner
    return owner is not None and not owner.alive(time.time())


def objects(run: StoredRun) -> list[Any]:
    return [(info.key, info.size, info.modified) for info in run.store.list(run.run_id)]


def test_a_frozen_controller_loses_its_run_and_writes_no_more(
    client: Client, tmp_path: Path
) -> None:
    hold(tmp_path, step=100)
    spec, root = job(tmp_path), tmp_path / "runs"
    run_id = client.submit(spec, base=tmp_path)
    run, states = StoredRun(f"{STORE}/{run_id}"), RunStates(root)
    wait_until(lambda: run.read() is not None and stored(run).checkpoint, "it is in the store")

    # Another controller, of this machine or another, gets neither the job nor the run.
    for rival_root in (root, tmp_path / "elsewhere"):
        rival = Rival(ControllerConfig("rival", str(rival_root), RunnerConfig(one_shot=True)))
        data = absolute_paths(spec, tmp_path).model_dump(mode="json", exclude_none=True)
        with pytest.raises(RunConflictError, match="a run of this very job, is run by another"):
            rival.submit(data, str(rival_root))
        with pytest.raises(RunConflictError, match="in the hands of process"):
            rival.resume(run.url, runs_root=str(rival_root))

    frozen, gang = states.get(run_id).owner, [row.pid for row in states.get(run_id).workers]
    assert frozen is not None and gang
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ClusterError, match="is there but has not answered for 1 s"):
            client._call(lambda controller: controller.status.remote(run_id), 1.0)
        wait_until(lambda: lease_is_over(run), "its lease runs out")
        elsewhere = run.restore(tmp_path / "third" / run_id)
        taken, etag = run.take(elsewhere, this_owner("third"))
        checkpoints = open_store(f"{run.url}/checkpoints")
        attempt = run.last_attempt() + 1
        Fence(checkpoints, run_uid=taken.uid, attempt=attempt, stage_index=0).take()
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    wait_until(lambda: states.get(run_id).moved_to, "it lets go")
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in gang), "its gang is gone")
    left = objects(run)
    assert "goes on elsewhere" in client.status(run_id)["reason"]
    with pytest.raises(RunConflictError, match="in the hands of process"):
        client.resume(run_id)
    time.sleep(2 * LEASE_SECONDS / 6)  # two of its beats
    assert objects(run) == left, "it writes nothing more"

    # The third lets go: the first machine may have the run again, from where the store is.
    run.write(taken.model_copy(update={"owner": None}), etag)
    assert client.resume(run_id) == run_id
    final = client.wait(run_id, timeout_seconds=200)

    assert final["state"] == "SUCCEEDED", final
    assert final["attempt"] > attempt
    done = read_run(Path(final["run_folder"])).records
    assert [record["step"] for record in effective_steps(done)] == list(range(1, STEPS + 1))
    assert (stored(run).state, stored(run).owner, stored(run).epoch) == ("SUCCEEDED", None, 3)
    again = run.restore(tmp_path / "fourth" / run_id)
    there = (Path(again.run_folder) / "metrics.jsonl").read_text()
    assert there == (Path(final["run_folder"]) / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in there.splitlines()][-1] == STEPS
