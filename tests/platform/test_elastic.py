"""Workers that come and go: the mesh follows, the rows of every step stay as they are."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from mini_books import VOCABULARY, write_books
from mini_jobs import wait_until as wait_for
from mini_jobs import worker_environment

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.spec import JobSpec
from ringworld_platform.client import Client
from ringworld_platform.drain import DrainWatch, Notice
from ringworld_platform.kernel_kill import ask_node
from ringworld_platform.mesh_choice import MeshChanged, MeshChoice
from ringworld_platform.run_states import RunStates
from ringworld_platform.runner_config import RunnerConfig
from ringworld_workers.actor import Identity
from ringworld_workers.oom_kills import read_oom_kills

WAIT_SECONDS = 200.0
STEPS = 200
SHORTAGE = "needs more"


def job(
    folder: Path, *, workers: dict[str, int], rows: int = 2, patience: str = "30s", **stage: Any
) -> JobSpec:
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": "elastic",
            "model": {
                "hidden_size": 32,
                "ffn_size": 48,
                "num_layers": 1,
                "num_heads": 8,
                "num_kv_heads": 2,
                "text_vocab_size": VOCABULARY,
                "vision": {"codebook_size": 16},
            },
            "data": {"sources": {"books": {"shards": str(folder / "books")}}},
            "resources": {"accelerator": "cpu", "workers": workers},
            "checkpoint": {"store": f"file://{folder}/runs", "every": "1000 steps"},
            "tracking": {"mlflow": "off"},
            "recovery": {"shrink_after": patience, "stall_timeout": "10min"},
            "stages": [
                {
                    "name": "only",
                    "context_length": 64,
                    "rope_theta": 1e4,
                    "steps": 100,
                    "global_batch_tokens": 64 * rows,
                    "mixture": {"books": 1.0},
                    "learning_rate": {"peak": 1e-3},
                    **stage,
                }
            ],
        }
    )


# --- which mesh, and when: no Ray ---


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_waits_for_nodes_then_shrinks_and_waits_no_more(tmp_path: Path) -> None:
    clock = Clock()
    spec = job(tmp_path, workers={"max": 16}, rows=4, mesh={"sequence_parallel": 4})
    choice = MeshChoice(spec, patient=True, clock=clock)
    wanted = MeshSize(4, 4)

    assert choice.begin(0, 8) == wanted
    assert choice.waiting(16, SHORTAGE) == SHORTAGE, "others have the workers: they will end"
    told = choice.waiting(8, SHORTAGE)
    assert told == (
        "8 of 16 workers are there; goes on with data_parallel 2 in 30 s (recovery.shrink_after)"
    )
    clock.now += 29
    assert "in less than 10 s" in choice.waiting(8, SHORTAGE)
    assert "in 30 s" in choice.waiting(9, SHORTAGE), "nodes come: there may be more of them"
    clock.now += 30
    with pytest.raises(MeshChanged):
        choice.waiting(9, SHORTAGE)
    assert choice.begin(0, 9) == MeshSize(4, 2)
    assert choice.explain(MeshSize(4, 2)) == (
        "stage only runs on ring 4 x data_parallel 2, not ring 4 x data_parallel 4: the cluster "
        "holds 9 of 16 workers; a step keeps its 4 rows, 2 micro-batches a ring"
    )
    # While it waits for these, a node is lost: it may come back.
    assert "5 of 8 workers are there; goes on with data_parallel 1" in choice.waiting(5, SHORTAGE)

    assert choice.begin(0, 9) == MeshSize(4, 2), "a restart finds the cluster as it was"
    assert choice.begin(0, 12) == wanted, "nodes have come"
    assert choice.begin(0, 16) == wanted
    assert choice.explain(wanted) is None
    assert choice.begin(0, 9) == wanted, "the cluster was whole in between"


def test_nothing_shrinks_below_the_minimum(tmp_path: Path) -> None:
    spec = job(tmp_path, workers={"min": 8, "max": 16}, rows=4, mesh={"sequence_parallel": 4})
    choice = MeshChoice(spec, patient=False)

    assert choice.begin(0, 7) == MeshSize(4, 4)
    assert choice.waiting(7, SHORTAGE) == SHORTAGE


def test_where_no_node_can_come_nothing_is_waited_for(tmp_path: Path) -> None:
    split = {"sequence_parallel": {"heads": 8}}
    spec = job(tmp_path, workers={"min": 1, "max": 8}, mesh=split)
    choice = MeshChoice(spec, patient=False)

    assert choice.begin(0, 5) == MeshSize(1, 1, 4), "8 heads, 2 key heads: 4 workers can split them"
    with pytest.raises(MeshChanged):
        choice.waiting(3, SHORTAGE)


def test_a_node_that_is_drained_is_noticed_once_a_second() -> None:
    asked = []

    def ask() -> dict[str, float | None]:
        asked.append(1)
        return {"b": time.time() + 25, "c": None}

    workers = [Identity(node, f"10.0.0.{n}", 1, ()) for n, node in enumerate("abc")]
    clock = Clock()
    watch = DrainWatch(ask, clock)

    assert watch.notice([]) is None
    assert watch.notice(workers[:1]) is None
    notice = watch.notice(workers[:2])
    assert notice is not None
    assert re.fullmatch(r"node 10\.0\.0\.1 is being drained, [12]\d s are left", notice.text)
    without = watch.notice(workers[2:])
    assert without is not None and without.text == "node 10.0.0.2 is being drained"
    assert len(asked) == 1
    clock.now += 1.0
    watch.notice(workers)
    assert len(asked) == 2


def test_what_ends_a_worker_at_once_was_no_warning() -> None:
    signal = Notice("rank 0 got SIGTERM", heard=10.0, sure=False)
    assert not signal.explains_loss(10.2)
    assert signal.explains_loss(12.0)
    assert Notice("node", heard=10.0, sure=True).explains_loss(10.2)


# --- nodes that are drained, and nodes that die ---


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that keeps the controller and one worker; nodes are added to it."""
    from ray.cluster_utils import Cluster

    checks = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 4,
    }
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": checks},
    )
    try:
        ray.init(
            address=made.address,
            namespace="ringworld",
            log_to_driver=False,
            runtime_env={"env_vars": worker_environment()},
        )
        yield made
    finally:
        ray.shutdown()
        for node in [*made.worker_nodes, made.head_node]:
            made.remove_node(node, allow_graceful=False)


wait_until = partial(wait_for, seconds=WAIT_SECONDS)


def drain(node: str, seconds: float) -> None:
    """Say that a node will be gone, as a cloud's preemption handler does."""
    from ray._private.state import state
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    assert node not in state.get_draining_nodes()
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, message = client.drain_node(node, reason, "test", int((time.time() + seconds) * 1e3))
    assert accepted, message


def nodes_of_gang(name: str = "") -> set[str]:
    """Nodes of the only gang, or of the one of that name; none where it has no room yet."""
    from ray.util.placement_group import placement_group_table

    groups = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
    named = [group for group in groups if name in ("", group["name"])]
    assert len(named) < 2
    return {node for group in named for node in group["bundles_to_node_id"].values()}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_grows_with_the_cluster_leaves_a_drained_node_and_outlives_a_dead_one(
    cluster: Any, tmp_path: Path
) -> None:
    from ringworld_workers.data.loader import StageLoader

    write_books(tmp_path / "books", train=40, held_out=2, longest=119)
    one = job(
        tmp_path, workers={"max": 2}, mesh={"sequence_parallel": 1}, patience="3s", steps=STEPS
    )
    (only,) = one.model_dump(mode="json")["stages"]
    stages = [{**only, "name": "early"}, only]
    spec = JobSpec.model_validate({**one.model_dump(mode="json"), "stages": stages})
    client = Client.attach(
        tmp_path / "controller", runner=RunnerConfig(prepare_function="mini_stage:build")
    )
    run_id = client.submit(spec)

    def at(attempt: int, stage: str = "only") -> Any:
        """Its gang has taken steps."""
        status = client.status(run_id)
        assert status["state"] not in ("FAILED", "SUCCEEDED"), status
        here = (status["attempt"], status["stage"]) == (attempt, stage) and status["workers"]
        return here and status["workers"][0]["step"] > 1 and status

    (worker,) = wait_until(lambda: at(1, "early"), "a gang on the head")["workers"]
    # So that the stage does not end before the nodes are there.
    os.kill(worker["pid"], signal.SIGSTOP)
    added = [cluster.add_node(num_cpus=1) for _ in range(2)]
    os.kill(worker["pid"], signal.SIGCONT)
    status = wait_until(lambda: at(1), "a larger gang in the next stage")
    assert (status["data_parallel_size"], len(status["workers"])) == (2, 2)
    leaving = next(node for node in added if node.node_id in nodes_of_gang())
    drain(leaving.node_id, 600)
    status = wait_until(lambda: at(2), "the second gang")
    assert leaving.node_id not in nodes_of_gang()
    assert (status["data_parallel_size"], len(status["workers"])) == (2, 2)
    assert RunStates(tmp_path / "runs").get(run_id).restarts == 0

    (dying,) = (node for node in added if node is not leaving)
    cluster.remove_node(dying, allow_graceful=False)
    status = wait_until(lambda: at(3), "the third gang")
    assert (status["data_parallel_size"], len(status["workers"])) == (1, 1)
    final = client.wait(run_id, timeout_seconds=WAIT_SECONDS)
    assert final["state"] == "SUCCEEDED", final

    events = client.events(run_id)
    (lost,) = [event for event in events if event["kind"] == "failure"]
    told = json.loads((Path(final["run_folder"]) / lost["evidence"] / "failure.json").read_text())
    assert told["ranks"][lost["rank"]]["node"] == dying.node_id
    assert {node["node"] for node in told["nodes"]} >= {node.node_id for node in added}
    texts = {kind: [e["text"] for e in events if e["kind"] == kind] for kind in ("drain", "mesh")}
    assert ["is being drained" in text for text in texts["drain"]] == [True, True]
    assert "saved step" in texts["drain"][1]
    assert texts["mesh"] == [
        f"stage {stage} runs on ring 1 x data_parallel 1, not ring 1 x data_parallel 2: the "
        "cluster holds 1 of 2 workers; a step keeps its 2 rows, 2 micro-batches a ring"
        for stage in ("early", "only")
    ]
    assert any(
        "1 of 2 workers are there; goes on with data_parallel 1" in event["text"]
        for event in events
    )
    starts = [r for r in client.metrics(run_id).items if r["kind"] == "stage_start"]
    assert [start["data_parallel_size"] for start in starts] == [1, 2, 2, 1]
    assert starts[2]["step"] > 0, "the drained gang has saved before it went"
    lines = (Path(final["run_folder"]) / "samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for stage in spec.stages:
        loader = StageLoader({"books": str(tmp_path / "books")}, stage, spec.seed)
        seen = {r["step"]: r["sample_ids"] for r in records if r["stage"] == stage.name}
        assert seen == {step + 1: loader.sample_ids(step) for step in range(stage.num_steps)}
    check_that_a_build_leaves_a_drained_node(cluster, client, tmp_path)


def check_that_a_build_leaves_a_drained_node(cluster: Any, client: Client, folder: Path) -> None:
    """Two builds that never end fill the head and a node, which is drained."""
    node = cluster.add_node(num_cpus=1).node_id
    here = read_oom_kills()
    assert ask_node(Identity(node, "", 0, (), "", here), WAIT_SECONDS).cgroup_file == (
        here.cgroup_file
    )
    recipe = folder / "frozen.yaml"
    recipe.write_text("kind: data\n")
    values = job(folder, workers={"max": 1}).model_dump(mode="json")
    values["data"] = {"recipe": str(recipe), "cache": str(folder / "cache")}
    builds = [
        client.submit(JobSpec.model_validate({**values, "name": name})) for name in ("one", "two")
    ]

    def where(run_id: str) -> set[str]:
        """Its node, once it builds."""
        building = client.status(run_id)["reason"].startswith("preparing data")
        return nodes_of_gang(f"{run_id}/data") if building else set()

    places = wait_until(lambda: all(map(where, builds)) and {b: where(b) for b in builds}, "both")
    (moved,) = (run_id for run_id, nodes in places.items() if nodes == {node})
    (other,) = (run_id for run_id in builds if run_id != moved)
    drain(node, 600)
    wait_until(lambda: client.status(moved)["state"] in ("WAITING", "QUEUED"), "it makes off")
    client.stop(other)
    wait_until(lambda: where(moved) == places[other], "it builds on the head")
    client.stop(moved)
    assert client.wait(moved, timeout_seconds=WAIT_SECONDS)["state"] == "STOPPED"
    (drained,) = [e["text"] for e in client.events(moved) if e["kind"] == "drain"]
    assert "is being drained" in drained
    assert not [e for e in client.events(moved) if e["kind"] == "failure"]
