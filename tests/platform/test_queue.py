"""Many jobs on one small cluster: who goes first, who makes way, what the others are told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringworld_jobs.spec import JobSpec
from ringworld_platform.client import Client
from ringworld_platform.cluster import local_cluster
from ringworld_platform.job_runner import RunnerConfig
from ringworld_platform.run_state import RunStates

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
WAIT_SECONDS = 150.0


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    roots = [REPOSITORY / name for name in ("jobs", "model", "platform", "workers")]
    paths = os.pathsep.join(str(path) for path in [*roots, HERE])
    with local_cluster(num_cpus=2, env_vars={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}):
        config = RunnerConfig(stage_function="mini_stage:run_stage")
        made = Client.attach(tmp_path_factory.mktemp("queue"), runner=config)
        yield made
        made.shutdown()


def job(
    store: Path,
    name: str,
    *,
    workers: int = 1,
    priority: int = 0,
    steps: int = 2,
    step_seconds: float = 0.01,
) -> JobSpec:
    """A job of one stage; eps carries the time of a step to mini_stage."""
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": name,
            "data": {"sources": {"books": {"shards": str(store / "books")}}},
            "optimizer": {"eps": step_seconds},
            "resources": {
                "accelerator": "cpu",
                "workers": {"min": workers, "max": workers},
                "priority": priority,
            },
            "checkpoint": {"store": f"file://{store}"},
            "tracking": {"mlflow": "off"},
            "stages": [
                {
                    "name": "1k",
                    "context_length": 1024,
                    "rope_theta": 1e4,
                    "steps": steps,
                    "global_batch_tokens": 1024,
                    "mesh": {"sequence_parallel": workers, "data_parallel": 1},
                    "mixture": {"books": 1.0},
                    "learning_rate": {"peak": 1e-3},
                }
            ],
        }
    )


def wait_until(check: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {WAIT_SECONDS:g} s: {what}")


def begun(client: Client, run_id: str) -> float:
    """When a run's first gang had its workers."""
    times = [e["time"] for e in client.events(run_id) if e.get("state") == "RUNNING"]
    return float(times[0])


def test_a_long_run_makes_way_and_goes_on_and_all_keep_to_the_line(
    client: Client, tmp_path: Path
) -> None:
    long = client.submit(job(tmp_path, "long", workers=2, steps=60, step_seconds=0.1))
    wait_until(lambda: client.status(long)["step"] >= 3, "the long run trains")

    low = client.submit(job(tmp_path, "low"))
    told = wait_until(
        lambda: (s := client.status(low))["state"] == "WAITING" and s, "low says what it waits for"
    )
    assert told["reason"].startswith(
        "needs 1 CPU bundle of 1 CPU; the largest node has 2 CPUs; 0 of 2 are free"
    )
    assert (told["place"], told["priority"]) == (1, 0)
    assert told["start_seconds"] > 0, "the long run knows how long it will take"
    asked = time.time()
    high = [client.submit(job(tmp_path, f"high-{n}", priority=5)) for n in range(2)]
    middle = [client.submit(job(tmp_path, f"mid-{n}", priority=1, workers=n + 1)) for n in range(2)]
    aside = wait_until(
        lambda: (s := client.status(long))["state"] == "QUEUED" and s, "the long run makes way"
    )
    assert aside["reason"].startswith(f"preempted by {high[0]} (priority 5) at step ")

    everyone = [long, low, *high, *middle]
    for run_id in everyone:
        final = client.wait(run_id, timeout_seconds=WAIT_SECONDS)
        assert final["state"] == "SUCCEEDED", final
        assert final["place"] is None

    starts = {run_id: begun(client, run_id) for run_id in everyone}
    # The long one, too, is of priority 0, and it was there before the low one.
    assert max(starts[run_id] for run_id in high) < min(starts[run_id] for run_id in middle)
    assert max(starts[run_id] for run_id in middle) < starts[low]
    assert min(starts[run_id] for run_id in high) - asked < 60
    record = RunStates(tmp_path).get(long)
    assert (record.restarts, record.attempt, record.error) == (0, 2, None)
    assert not [e for e in client.events(long) if e["kind"] == "failure"]
    (preempted,) = [e["text"] for e in client.events(long) if e["kind"] == "preempted"]
    assert preempted.endswith("goes on from its checkpoint")
    steps = [r["step"] for r in client.metrics(long).items if r["kind"] == "step"]
    assert steps == list(range(1, 61)), "no step twice, none left out"
