"""The controller on a real local Ray: stages, deaths, stops, restarts. One Ray for the module."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mini_jobs import hold, mini_client, mini_cluster, mini_job, wait_until

from ringworld_jobs.resolve import spec_digest
from ringworld_jobs.spec import JobSpec
from ringworld_platform.capacity import cluster
from ringworld_platform.client import Client, absolute_paths, runs_root_of
from ringworld_platform.errors import JobTooLarge, PlatformError, RunConflictError, UnknownRunError
from ringworld_platform.first_cause import lost_worker
from ringworld_platform.run_state import JobRecord, RunState
from ringworld_platform.run_states import RunStates

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

WAIT_SECONDS = 150.0


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with mini_cluster(num_cpus=4):
        yield


@pytest.fixture(scope="module")
def client(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with mini_client(tmp_path_factory.mktemp("controller")) as made:
        yield made


def steps_of(client: Client, run_id: str) -> list[tuple[str, int, int]]:
    records = client.metrics(run_id).items
    return [(r["stage"], r["step"], r["attempt"]) for r in records if r["kind"] == "step"]


def events_of(client: Client, run_id: str, kind: str) -> list[str]:
    return [event["text"] for event in client.events(run_id) if event["kind"] == kind]


def reached(client: Client, run_id: str, step: int) -> dict[str, Any]:
    def check() -> dict[str, Any] | None:
        status = client.status(run_id)
        assert status["state"] not in ("FAILED", "STOPPED"), status
        return status if status["step"] >= step and status["workers"] else None

    status: dict[str, Any] = wait_until(check, f"{run_id} at step {step}")
    return status


def test_stages_of_different_sizes_run_one_after_the_other(client: Client, tmp_path: Path) -> None:
    spec = mini_job(tmp_path, recipe="recipe.yaml")

    run_id = client.submit(spec, base=tmp_path)
    assert client.submit(spec, base=tmp_path) == run_id
    status = client.wait(run_id, timeout_seconds=WAIT_SECONDS)

    assert run_id == "mini-1"
    assert status["state"] == "SUCCEEDED", status
    assert (status["attempt"], status["global_step"], status["stage_index"]) == (1, 12, 1)
    assert status["checkpoint"] == "01-4k/step-00000006"
    wanted = [("1k", n, 1) for n in range(1, 7)] + [("4k", n, 1) for n in range(1, 7)]
    assert steps_of(client, run_id) == wanted
    folder = Path(status["run_folder"])
    assert folder == runs_root_of(spec) / run_id
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples[0] == {"stage": "1k", "step": 1, "attempt": 1, "sample_ids": ["1k:1"]}
    assert "sample_ids" not in (folder / "metrics.jsonl").read_text()
    assert "books" in events_of(client, run_id, "data")[0]
    assert [s["run_id"] for s in client.list()].count(run_id) == 1
    with pytest.raises(RunConflictError, match="has succeeded"):
        client.resume("mini")
    with pytest.raises(UnknownRunError, match="no run or job 'other'"):
        client.status("other")


def test_a_killed_worker_is_noticed_and_replaced(client: Client, tmp_path: Path) -> None:
    hold(tmp_path, step=50, rank=1)
    spec = mini_job(
        tmp_path,
        name="killed",
        stages=(("1k", 2, 60),),
        step_seconds=0.02,
        stall_timeout="10min",
    )
    run_id = client.submit(spec)
    status = reached(client, run_id, 12)

    killed = time.time()
    os.kill(status["workers"][1]["pid"], signal.SIGKILL)
    final = client.wait(run_id, timeout_seconds=WAIT_SECONDS)

    assert final["state"] == "SUCCEEDED", final
    assert final["attempt"] == 2
    (failure,) = [e for e in client.events(run_id) if e["kind"] == "failure"]
    assert failure["rank"] == 1
    # The kernel has killed nobody for memory, and Ray does not know who has.
    assert failure["failure"] == "worker lost"
    assert "rank 1 (pid" in failure["text"] and "ended without a Python error" in failure["text"]
    # Evidence included, which takes most of a second; much more where the machine is busy.
    assert failure["time"] - killed < 60.0, "not when a collective runs out of time"
    stacks = (Path(final["run_folder"]) / failure["evidence"] / "stacks.txt").read_text()
    assert "===== rank 0" in stacks and "all_reduce" in stacks
    # What Ray says of the lost one; the other rank's stacks hold any words.
    assert lost_worker(1, "", RuntimeError(stacks.split("===== rank 1")[1])).unexplained
    again = [r for r in client.metrics(run_id).items if r["kind"] == "step" and r["attempt"] == 2]
    assert again[0]["step"] > 1, "it starts at the checkpoint, not over"
    assert again[0]["time"] - killed < WAIT_SECONDS


def test_a_worker_that_is_told_to_end_saves_first_and_it_costs_nothing(
    client: Client, tmp_path: Path
) -> None:
    go_on = hold(tmp_path, step=20)
    spec = mini_job(
        tmp_path,
        name="told",
        stages=(("1k", 2, 40),),
        step_seconds=0.05,
        max_restarts=0,
        stall_timeout="10min",
    )
    run_id = client.submit(spec)
    status = reached(client, run_id, 19)

    os.kill(status["workers"][1]["pid"], signal.SIGTERM)
    wait_until(lambda: "to go on elsewhere" in client.status(run_id)["reason"], "it is heard")
    go_on.touch()
    final = client.wait(run_id, timeout_seconds=WAIT_SECONDS)

    assert (final["state"], final["attempt"]) == ("SUCCEEDED", 2), final
    told, saved = events_of(client, run_id, "drain")
    assert told == f"rank 1 (pid {status['workers'][1]['pid']}) got SIGTERM"
    assert saved.startswith(f"{told}; saved step ")
    assert events_of(client, run_id, "failure") == []
    assert [step for _, step, _ in steps_of(client, run_id)] == list(range(1, 41)), "none twice"


def test_an_error_of_the_data_fails_without_restarts(client: Client, tmp_path: Path) -> None:
    fault = {"kind": "value", "rank": 0, "step": 2, "attempts": 99}
    (tmp_path / "fault.json").write_text(json.dumps(fault))
    during = client.submit(mini_job(tmp_path, name="bad-row", stages=(("1k", 1, 6),)))
    before = client.submit(
        mini_job(tmp_path, name="bad-recipe", recipe="broken.yaml"), base=tmp_path
    )

    first = client.wait(during, timeout_seconds=WAIT_SECONDS)
    second = client.wait(before, timeout_seconds=WAIT_SECONDS)

    assert (first["state"], first["attempt"]) == ("FAILED", 1)
    assert first["error"] == "rank 0: ValueError: row 2 has no tokens; rebuild the dataset"
    assert (second["state"], second["attempt"]) == ("FAILED", 0)
    assert "video 7 has no frames" in second["error"]


def test_a_frozen_data_build_is_given_up_and_a_long_one_is_not(
    client: Client, tmp_path: Path
) -> None:
    impatient = {"stall_timeout": "3s", "max_restarts": 0}
    frozen = client.submit(
        mini_job(tmp_path, name="frozen-data", recipe="frozen.yaml", **impatient), base=tmp_path
    )
    long = client.submit(
        mini_job(
            tmp_path, name="long-data", stages=(("1k", 1, 2),), recipe="long.yaml", **impatient
        ),
        base=tmp_path,
    )

    first = client.wait(frozen, timeout_seconds=WAIT_SECONDS)
    second = client.wait(long, timeout_seconds=WAIT_SECONDS)

    assert first["state"] == "FAILED"
    assert "no progress for 3 s (recovery.stall_timeout): rank 0 (pid" in first["error"]
    assert second["state"] == "SUCCEEDED", second


def test_stop_then_resume(client: Client, tmp_path: Path) -> None:
    go_on = hold(tmp_path, step=20)
    spec = mini_job(
        tmp_path,
        name="stopped",
        stages=(("1k", 2, 40),),
        step_seconds=0.05,
        stall_timeout="10min",
    )
    run_id = client.submit(spec)
    reached(client, run_id, 19)

    assert client.stop("stopped") == run_id
    wait_until(lambda: client.status(run_id)["state"] == "STOPPING", "it is asked to stop")
    go_on.touch()
    stopped = client.wait(run_id, timeout_seconds=WAIT_SECONDS)
    assert stopped["state"] == "STOPPED", stopped
    assert stopped["workers"] == []
    assert client.resume(run_id, older=True) == run_id
    final = client.wait(run_id, timeout_seconds=WAIT_SECONDS)

    assert (final["state"], final["attempt"]) == ("SUCCEEDED", 2), final
    starts = [r for r in client.metrics(run_id).items if r["kind"] == "stage_start"]
    assert [start["older"] for start in starts] == [False, True]
    record = RunStates(tmp_path).get(run_id)
    assert not record.take_older, "a checkpoint was committed since"
    assert {start["uid"] for start in starts} == {record.uid} and len(record.uid) == 32
    steps = [step for _, step, _ in steps_of(client, run_id)]
    assert steps == list(range(1, 41)), "no step twice, none left out"


def test_a_job_that_can_never_fit_is_refused(client: Client, tmp_path: Path) -> None:
    huge = mini_job(tmp_path, name="huge", stages=(("1k", 32, 1),), workers=(32, 64))
    wide = mini_job(tmp_path, name="wide").resources.model_copy(update={"cpus_per_worker": 64})

    # Ray's word that no autoscaler is there comes some seconds after its start.
    wait_until(lambda: cluster().growth == {}, "Ray knows that nobody adds nodes")
    with pytest.raises(JobTooLarge, match=r"stages\[0\] \(1k\) needs 32 CPU bundles of 1 CPU"):
        client.submit(huge)
    with pytest.raises(JobTooLarge, match="cpus_per_worker = 64: the largest node has 4 CPUs"):
        client.submit(mini_job(tmp_path, name="wide").model_copy(update={"resources": wide}))

    assert RunStates(tmp_path).all() == [], "no run has come of it"


def test_a_killed_controller_goes_on_with_its_jobs(client: Client, tmp_path: Path) -> None:
    hold(tmp_path, step=50)
    spec = mini_job(
        tmp_path,
        name="survives",
        stages=(("1k", 2, 60),),
        step_seconds=0.05,
        stall_timeout="10min",
    )
    run_id = client.submit(spec)
    reached(client, run_id, 6)
    record = RunStates(tmp_path).get(run_id)
    assert record.owner is not None

    os.kill(record.owner.pid, signal.SIGKILL)
    final = client.wait(run_id, timeout_seconds=WAIT_SECONDS)

    assert final["state"] == "SUCCEEDED", final
    assert final["attempt"] == 2
    owner = RunStates(tmp_path).get(run_id).owner
    assert owner is not None
    assert (owner.controller, owner.pid != record.owner.pid) == (record.owner.controller, True)
    assert len([s for s in client.list() if s["job"] == "survives"]) == 1
    last = [step for _, step, attempt in steps_of(client, run_id) if attempt == 2]
    assert last == list(range(last[0], 61))


def left_behind(spec: JobSpec, store: Path, **fields: Any) -> str:
    """A run as a controller leaves it that is killed; its spec was not yet written."""
    digest = spec_digest(absolute_paths(spec, store))

    def record(run_id: str, path: Path) -> JobRecord:
        about = {"job": spec.name, "run_id": run_id, "run_folder": str(path), "num_stages": 1}
        return JobRecord(**about, spec_digest=digest, submitted=time.time(), **fields)

    return RunStates(store).create(spec.name, record).run_id


def test_a_folder_that_cannot_be_written_leaves_no_half_run(client: Client, tmp_path: Path) -> None:
    spec = mini_job(tmp_path, name="nowhere", stages=(("1k", 1, 2),))
    (tmp_path / "nowhere-1").mkdir()
    (tmp_path / "nowhere-1" / "logs").write_text("a file in the way of the logs")

    with pytest.raises(PlatformError, match="cannot write the run folder .*nowhere-1"):
        client.submit(spec)

    assert RunStates(tmp_path).all() == []
    run_id = client.submit(spec)
    assert client.wait(run_id, timeout_seconds=WAIT_SECONDS)["state"] == "SUCCEEDED"
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.raises(PlatformError, match="a part of the path is a file"):
        client.submit(mini_job(blocked / "runs", name="nowhere"))


def test_a_submission_that_was_cut_short_is_made_good_or_ended(
    client: Client, tmp_path: Path
) -> None:
    spec = mini_job(tmp_path, name="cut", stages=(("1k", 1, 2),))
    run_id = left_behind(spec, tmp_path)

    assert client.submit(spec, base=tmp_path) == run_id, "it is the same job"
    assert client.wait(run_id, timeout_seconds=WAIT_SECONDS)["state"] == "SUCCEEDED"

    lost = left_behind(mini_job(tmp_path, name="lost"), tmp_path)
    final = client.wait(lost, timeout_seconds=WAIT_SECONDS)
    assert final["state"] == "FAILED"
    assert "its spec cannot be read, submit it again" in final["error"]


def test_a_job_that_was_interrupted_twice_can_be_submitted_anew(
    client: Client, tmp_path: Path
) -> None:
    spec = mini_job(tmp_path, name="twice", stages=(("1k", 1, 2),))
    first = left_behind(spec, tmp_path, state=RunState.STOPPING, stop_requested=True)

    second = client.submit(spec, base=tmp_path)

    assert (first, second) == ("twice-1", "twice-2")
    assert client.status(first)["state"] == "STOPPED"
    assert client.wait(second, timeout_seconds=WAIT_SECONDS)["state"] == "SUCCEEDED"


def test_nothing_is_left_on_the_cluster(client: Client) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    assert groups == []
    wait_until(lambda: ray.available_resources().get("CPU") == 4.0, "all CPUs free again")
