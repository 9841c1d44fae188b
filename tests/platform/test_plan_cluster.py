"""A plan for the nodes of a real Ray cluster, whose GPUs exist by name only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).parents[2]


@pytest.fixture
def address() -> Iterator[str]:
    """One node of eight A100, 8 CPUs each."""
    named = {"accelerator_type:A100-40G": 1}
    ray.init(
        address="local",
        num_cpus=64,
        num_gpus=8,
        resources=named,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_cluster_is_asked_for_its_gpus(address: str) -> None:
    program = "from ringworld_platform.cli import main; main()"
    command = [sys.executable, "-c", program, "plan", "jobs/lwm-text-7b.yaml", "--cluster"]
    done = subprocess.run(
        [*command, "--address", address, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    found = json.loads(done.stdout)
    assert (found["device"], found["devices"], found["devices_per_node"]) == ("A100-40GB", 8, 8)
    assert found["origin"] == f"the cluster at {address}"
    last = found["stages"][-1]
    # The curriculum wants 64; on 8 the ring gives way as it would in training.
    assert (last["mesh"]["ring"], last["mesh"]["data_parallel"]) == (8, 1)
    assert last["mesh"]["wanted_workers"] == 64
    assert "64 workers, and there are 8" in last["mesh"]["reason"]
    assert done.returncode == (0 if found["fits"] else 1)
