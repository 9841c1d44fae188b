"""A job on a cluster that grows and shrinks, with Ray's own autoscaler."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from autoscaling_cluster import autoscaling_cluster
from mini_jobs import hold, mini_client, mini_job, wait_until, worker_environment

from ringworld_platform.client import Client
from ringworld_platform.errors import JobTooLarge
from ringworld_platform.run_states import RunStates

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

WAIT_SECONDS = 120.0


def asking(client: Client, run_id: str) -> list[int]:
    """Which events tell of asking for nodes ahead."""
    return [event["seq"] for event in client.events(run_id) if event["kind"] == "prewarm"]


def test_nodes_come_before_the_stage_that_wants_them_and_go_after_it(tmp_path: Path) -> None:
    stages = (("1k", 1, 80), ("4k", 2, 10))
    go_on = hold(tmp_path, step=70, attempts=9)
    with (
        autoscaling_cluster(most=2, idle_seconds=2.0, env_vars=worker_environment()) as cluster,
        mini_client(tmp_path) as client,
    ):
        client.list()  # the controller has its place on the head before any node comes
        with pytest.raises(JobTooLarge, match="all nodes that may come together hold 2"):
            client.submit(mini_job(tmp_path, "huge", stages=(("4k", 3, 10),), workers=(3, 3)))
        spec = mini_job(
            tmp_path,
            stages=stages,
            step_seconds=0.1,
            workers=(1, 2),
            prewarm="1h",
            stall_timeout="10min",
            shrink_after="10min",
        )
        run_id = client.submit(spec)
        wait_until(
            lambda: "; asked the autoscaler for 1 node " in client.status(run_id)["reason"],
            "it says what it waits for",
        )
        wait_until(lambda: cluster.requested() == 2, "two nodes are asked for", WAIT_SECONDS)
        wait_until(lambda: asking(client, run_id), "it says so")
        owner = RunStates(tmp_path).get(run_id).owner
        assert owner is not None
        os.kill(owner.pid, signal.SIGKILL)
        wait_until(lambda: cluster.requested() == 0, "a new controller lets go", WAIT_SECONDS)

        wait_until(lambda: cluster.requested() == 2, "which asks again", WAIT_SECONDS)
        wait_until(lambda: cluster.nodes().alive == 2, "both nodes are there", WAIT_SECONDS)
        go_on.touch()

        final = client.wait(run_id, timeout_seconds=WAIT_SECONDS)
        assert final["state"] == "SUCCEEDED", final
        events = client.events(run_id)
        asked = asking(client, run_id)
        (done,) = [event["seq"] for event in events if event["text"] == "stage 1k is done"]
        assert len(asked) == 2 and max(asked) < done, events
        assert not [e for e in events if e.get("state") == "WAITING" and e["seq"] > done], events
        assert cluster.requested() == 0
        wait_until(lambda: cluster.nodes().alive == 0, "the nodes go", WAIT_SECONDS)
        head = psutil.Process(cluster.head_pid)
        family = [head, *head.children(recursive=True)]
    assert not [process for process in family if process.is_running()]
