"""Many jobs on one small cluster: who goes first, who makes way, what the others are told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mini_jobs import hold, mini_client, mini_cluster, mini_job, wait_until

from ringworld_jobs.spec import JobSpec
from ringworld_platform.client import Client
from ringworld_platform.run_states import RunStates

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

WAIT_SECONDS = 150.0
STEPS = 120


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with mini_cluster(num_cpus=2), mini_client(tmp_path_factory.mktemp("queue")) as made:
        yield made


def job(store: Path, name: str, *, workers: int = 1, steps: int = 2, **fields: Any) -> JobSpec:
    """A job of one stage on so many workers."""
    stages = (("1k", workers, steps),)
    return mini_job(store, name, stages=stages, workers=(workers, workers), **fields)


def ended_at(client: Client, run_id: str) -> float:
    (time_of_end,) = [e["time"] for e in client.events(run_id) if e.get("state") == "SUCCEEDED"]
    return float(time_of_end)


def test_a_long_run_makes_way_and_goes_on_and_all_keep_to_the_line(
    client: Client, tmp_path: Path
) -> None:
    go_on = hold(tmp_path, step=20)
    patient = {"step_seconds": 0.05, "stall_timeout": "10min"}
    long = client.submit(job(tmp_path, "long", workers=2, steps=STEPS, **patient))
    wait_until(lambda: client.status(long)["step"] == 19, "the long run trains")

    low = client.submit(job(tmp_path, "low"))
    told = wait_until(
        lambda: (s := client.status(low))["state"] == "WAITING" and s, "low says what it waits for"
    )
    assert told["reason"].startswith(
        "needs 1 CPU bundle of 1 CPU; the largest node has 2 CPUs; 0 of 2 are free"
    )
    assert (told["place"], told["priority"]) == (1, 0)
    assert told["start_seconds"] > 0, "the long run knows how long it will take"
    gone = client.submit(job(tmp_path, "gone", workers=2))
    behind = wait_until(lambda: (s := client.status(gone))["place"] == 2 and s, "gone is second")
    assert f"behind {low}" in behind["reason"]
    client.stop(gone)
    ended = client.wait(gone, timeout_seconds=WAIT_SECONDS)
    assert (ended["state"], ended["place"]) == ("STOPPED", None)
    high = [client.submit(job(tmp_path, f"high-{n}", priority=5)) for n in range(2)]
    middle = [client.submit(job(tmp_path, f"mid-{n}", priority=1, workers=n + 1)) for n in range(2)]
    wait_until(lambda: client.status(long)["state"] == "STOPPING", "the long run is asked to")
    go_on.touch()
    aside = wait_until(
        lambda: (s := client.status(long))["state"] == "QUEUED" and s, "the long run makes way"
    )
    assert aside["reason"].startswith(f"preempted by {high[0]} (priority 5) at step ")

    everyone = [long, low, *high, *middle]
    for run_id in everyone:
        final = client.wait(run_id, timeout_seconds=WAIT_SECONDS)
        assert final["state"] == "SUCCEEDED", final
        assert final["place"] is None

    ends = {run_id: ended_at(client, run_id) for run_id in everyone}
    # The last of those in the middle needs both CPUs, as does the long one, which came before low.
    assert max(ends[run_id] for run_id in high) < ends[middle[-1]]
    assert max(ends[run_id] for run_id in middle) < ends[long] < ends[low]
    record = RunStates(tmp_path).get(long)
    assert (record.restarts, record.attempt, record.error) == (0, 2, None)
    assert not [e for e in client.events(long) if e["kind"] == "failure"]
    (preempted,) = [e["text"] for e in client.events(long) if e["kind"] == "preempted"]
    assert preempted.endswith("goes on from its checkpoint")
    steps = [r["step"] for r in client.metrics(long).items if r["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1)), "no step twice, none left out"
