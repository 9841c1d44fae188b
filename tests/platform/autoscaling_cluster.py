"""A cluster on this machine that grows and shrinks: Ray's own autoscaler, v2, and its fake nodes.

Ray's ``AutoscalingCluster`` would end every Ray of the machine by ``ray stop --force``; here only
what was started here is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler.v2.sdk import get_cluster_status

from ringworld_platform.cluster import NAMESPACE

START_SECONDS = 120
END_SECONDS = 20.0
UPDATE_SECONDS = 1
HEAD, WORKER = "ray.head.default", "worker"
OBJECT_STORE_BYTES = 78_643_200


@dataclass(frozen=True, slots=True)
class NodeCounts:
    """Nodes besides the head, as the autoscaler sees them.

    Attributes:
        busy: alive, somebody uses them.
        idle: alive, nobody uses them.
        pending: asked of the provider, not there yet.
    """

    busy: int
    idle: int
    pending: int

    @property
    def alive(self) -> int:
        """Nodes that are there."""
        return self.busy + self.idle


@dataclass(frozen=True, slots=True)
class AutoscalingCluster:
    """A cluster that this process is connected to.

    Attributes:
        address: of its head.
        head_pid: the process that all others come from.
        most: nodes besides the head.
    """

    address: str
    head_pid: int
    most: int

    def nodes(self) -> NodeCounts:
        """How many nodes there are now."""
        status = get_cluster_status(self.address)
        busy = sum(node.node_id != FAKE_HEAD_NODE_ID for node in status.active_nodes)
        idle = sum(node.node_id != FAKE_HEAD_NODE_ID for node in status.idle_nodes)
        # The autoscaler's word is a second or two older than the nodes': some are in both.
        there = {node.instance_id for node in (*status.active_nodes, *status.idle_nodes)}
        pending = sum(
            node.ray_node_type_name == WORKER and node.instance_id not in there
            for node in status.pending_nodes
        ) + sum(launch.count for launch in status.pending_launches)
        return NodeCounts(busy, idle, min(pending, self.most - busy - idle))

    def requested(self) -> int:
        """Bundles that ``request_resources`` holds."""
        demands = get_cluster_status(self.address).resource_demands
        return sum(
            bundle.count
            for constraint in demands.cluster_constraint_demand
            for bundle in constraint.bundles_by_count
        )


@contextlib.contextmanager
def autoscaling_cluster(
    *,
    cpus: int = 1,
    most: int = 4,
    idle_seconds: float = 5.0,
    env_vars: Mapping[str, str] | None = None,
) -> Iterator[AutoscalingCluster]:
    """Start a head without CPUs whose autoscaler adds nodes, and connect to it.

    Args:
        cpus: of a node.
        most: nodes besides the head.
        idle_seconds: after which a node is removed.
        env_vars: environment of every process.
    """
    # Ray's sockets have paths of 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="rw-", dir="/tmp"))
    port = _free_port()
    config = folder / "autoscaler.yaml"
    config.write_text(json.dumps(_config(port, cpus, most, idle_seconds)), encoding="utf-8")
    environment = {
        **os.environ,
        **(env_vars or {}),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": str(UPDATE_SECONDS),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    command += [f"--autoscaling-config={config}", f"--temp-dir={folder}"]
    output = folder / "head.log"
    with output.open("wb") as log:
        head = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )
    try:
        address = f"{_ip()}:{port}"
        _await(head, output, address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
        yield AutoscalingCluster(address, head.pid, most)
    finally:
        ray.shutdown()
        end_family(head.pid)
        head.wait(END_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def end_family(pid: int) -> None:
    """End a process and all that it has started."""
    try:
        head = psutil.Process(pid)
        family = [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        head.terminate()
    _, left = psutil.wait_procs(family, timeout=3.0)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(left, timeout=END_SECONDS)
    if left:
        raise RuntimeError(f"still there: {[process.pid for process in left]}")


def _config(port: int, cpus: int, most: int, idle_seconds: float) -> dict[str, object]:
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "idle_timeout_minutes": idle_seconds / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{_ip()}:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            WORKER: {
                "resources": {"CPU": cpus, "object_store_memory": OBJECT_STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "head_node_type": HEAD,
        # A provider of one's own has no defaults for these.
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _await(head: subprocess.Popen[bytes], output: Path, address: str) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + START_SECONDS
    while "--block" not in output.read_text(errors="replace"):
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"no head at {address}: {output.read_text(errors='replace')[-2000:]}"
            )
        time.sleep(0.1)
    socket.create_connection((host, int(port)), timeout=5.0).close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def _ip() -> str:
    return ray.util.get_node_ip_address()
