"""Clusters: started for a command, started to stay, refused with one clear sentence."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ringworld_platform import cluster, head
from ringworld_platform.errors import ClusterError

TIMEOUT_SECONDS = 100.0
LISTENERS = """
import psutil
def listeners(pid):
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    sockets = [c for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    return sorted({c.laddr.ip.removeprefix("::ffff:") for c in sockets}), len(sockets)
"""


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_taken_port_is_named(taken_port: int, home: Path) -> None:
    with pytest.raises(ClusterError, match=f"port {taken_port} is taken"):
        head.up(port=taken_port)


def test_an_address_of_another_machine_is_named(home: Path) -> None:
    with pytest.raises(ClusterError, match=r"192\.0\.2\.255 is no address .* it has .*127"):
        head.up(host="192.0.2.255")


def test_ray_imported_before_would_look_elsewhere(
    home: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray  # noqa: F401

    for name in head.LOOPBACK_ONLY:
        monkeypatch.delenv(name, raising=False)
    created = psutil.Process().create_time()
    record = {"address": f"127.0.0.1:{free_port}", "dashboard_url": None, "pid": os.getpid()}
    (home / ".ringworld").mkdir()
    (home / ".ringworld" / "cluster.json").write_text(json.dumps({**record, "started": created}))
    with pytest.raises(ClusterError, match="before `import ray`"):
        cluster.connect()


def test_a_silent_address_is_named(free_port: int, home: Path) -> None:
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at 127.0.0.1:{free_port}"):
        cluster.connect(f"127.0.0.1:{free_port}")
    with pytest.raises(ClusterError, match="write HOST:PORT"):
        cluster.connect("somewhere")


def test_without_a_cluster_it_is_said_at_once(
    free_port: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own search would try a cluster that it remembers, dead or somebody else's."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="start one with `ringworld up`"):
        cluster.connect()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at 127.0.0.1:{free_port}"):
        cluster.connect()


def test_down_without_a_cluster_of_ours_stops_nothing(home: Path) -> None:
    assert head.down() is False
    folder = home / ".ringworld"
    folder.mkdir()
    record = {"address": "127.0.0.1:1", "dashboard_url": None, "pid": os.getpid(), "started": 1.0}
    (folder / "cluster.json").write_text(json.dumps(record))
    assert head.find_running() is None, "the process number belongs to somebody else now"
    assert head.down() is False


def test_a_head_that_cannot_be_recorded_is_not_left_running(home: Path, free_port: int) -> None:
    (home / ".ringworld" / "cluster.json").mkdir(parents=True)
    with pytest.raises(ClusterError, match="cannot write .*the cluster was not started"):
        head.up(num_cpus=1, port=free_port, dashboard=False)
    assert not head.answers("127.0.0.1", free_port)


def run_python(script: str, home: Path, *, stop_at: str | None = None) -> list[str]:
    """Run a script under another home; send it SIGTERM once it prints ``stop_at``."""
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_AUTH_MODE", None)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", LISTENERS + textwrap.dedent(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    try:
        if stop_at is not None and process.stdout is not None:
            for line in process.stdout:
                lines.append(line.strip())
                if line.startswith(stop_at):
                    process.send_signal(signal.SIGTERM)
                    break
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, errors
    return lines + output.splitlines()


def assert_gone(pids: str) -> None:
    """None of the processes is left, but for the moment that the system takes to bury them."""
    left = []
    for pid in map(int, pids.split()):
        with suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_terminated_command_leaves_no_process(tmp_path: Path) -> None:
    script = """
        import os, psutil, time
        from ringworld_platform.cluster import local_cluster
        try:
            with local_cluster(num_cpus=1):
                print(*listeners(os.getpid()))
                print(*(child.pid for child in psutil.Process().children(recursive=True)))
                print("ready")
                time.sleep(100)
        except KeyboardInterrupt:
            print("interrupted")
    """
    where, pids, *rest = run_python(script, tmp_path, stop_at="ready")

    assert where.startswith("['127.0.0.1']"), where
    assert rest == ["ready", "interrupted"]
    assert pids
    assert_gone(pids)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_up_connect_down(tmp_path: Path, free_port: int) -> None:
    # As on the command line: one process a command.
    start = f"""
        import psutil
        from ringworld_platform import head
        made = head.up(num_cpus=3, port={free_port}, dashboard=False)
        print(made.address)
        print(made.pid, *(c.pid for c in psutil.Process(made.pid).children(recursive=True)))
    """
    use = f"""
        from ringworld_platform import cluster, head
        from ringworld_platform.errors import ClusterError
        try:
            head.up(port={free_port})
        except ClusterError as error:
            print(error)
        print(cluster.connect(name="submit mini").address)
        import ray
        from ray._private.worker import global_worker
        print(global_worker.core_worker.get_job_config().metadata["job_name"])
        print(ray.cluster_resources()["CPU"])
        class Listens:
            def here(self): return 1
        actor = ray.remote(Listens).remote()
        ray.get(actor.here.remote(), timeout=60)
        print(*listeners(head.find_running().pid))
    """
    stop = "from ringworld_platform import head; print(head.down(), head.down())"
    try:
        address, pids = run_python(start, tmp_path)
        refusal, connected, named, cpus, where = run_python(use, tmp_path)
    finally:
        stopped = run_python(stop, tmp_path)

    assert address == connected == f"127.0.0.1:{free_port}"
    assert where.startswith("['127.0.0.1']"), where
    assert f"a cluster runs already at {address}" in refusal
    assert named == "submit mini"
    assert (cpus, stopped) == ("3.0", ["True False"])
    assert len(pids.split()) > 3
    assert_gone(pids)
    assert (tmp_path / ".ray" / "auth_token").is_file(), "the cluster asks for a token"
