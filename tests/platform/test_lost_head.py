"""The head of `ringworld up` is killed, and another one goes on with its runs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from mini_jobs import wait_until, worker_environment
from typer.testing import CliRunner

from ringworld_platform import head
from ringworld_platform.cli import app
from ringworld_platform.run_records import effective_steps, read_run
from ringworld_platform.run_state import RunState
from ringworld_platform.run_states import RunStates

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

STEPS = 120
# Connected before anything imports Ray, as commands do.
START = """
    from ringworld_platform import cluster, head
    head.up(num_cpus=2, port={port}, dashboard=False)
    cluster.connect()
    from mini_jobs import LOGGED, hold, mini_job
    from pathlib import Path
    from ringworld_platform.client import Client
    runs, stages = Path("runs").absolute(), (("1k", 2, {steps}),)
    runs.mkdir()
    hold(runs, step=60)
    spec = mini_job(runs, stages=stages, step_seconds=0.05, stall_timeout="10min")
    client = Client.attach(Path("elsewhere"), runner=LOGGED, roots_file="~/.ringworld/runs.json")
    print(client.submit(spec))
"""
AGAIN = """
    from ringworld_platform import cluster, head
    head.up(num_cpus=2, port={port}, dashboard=False)
    cluster.connect()
    from mini_jobs import LOGGED
    from ringworld_platform.going_on import take_up, unfinished
    print(*take_up(unfinished(), runner=LOGGED))
"""
ALONE = """
    import time
    from mini_jobs import LOGGED, mini_job, worker_environment
    from pathlib import Path
    from dataclasses import replace
    from ringworld_platform.client import Client
    from ringworld_platform.cluster import local_cluster
    spec = mini_job(Path("runs").absolute(), stages=(("1k", 1, 20000),), step_seconds=0.05)
    with local_cluster(num_cpus=1, env_vars=worker_environment()):
        Client.attach(Path("runs"), runner=replace(LOGGED, one_shot=True)).submit(spec)
        time.sleep(300)
"""


def members(session: int) -> list[psutil.Process]:
    """What its leader has started and is alive. Ray's workers overwrite their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != "zombie":
                found.append(process)
    return found


def any_named(session: int, names: tuple[str, ...]) -> bool:
    for process in members(session):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(names):
                return True
    return False


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(home: Path) -> Callable[..., str]:
    def run(text: str, **values: int) -> str:
        environment = {**os.environ, **worker_environment()}
        environment.pop("RAY_AUTH_MODE", None)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(text).format(**values)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_another_head_goes_on_where_a_killed_one_was(
    home: Path, script: Callable[..., str], unused_ports: tuple[int, int]
) -> None:
    states = RunStates(home / "runs")
    try:
        run_id = script(START, port=unused_ports[0], steps=STEPS)
        wait_until(lambda: states.get(run_id).step >= 8, "it has a checkpoint")
        lost = head.find_running()
        assert lost is not None and lost.pid is not None and head.find_lost() is None
        family = members(lost.pid)
        names = {process.name() for process in family}
        assert {"raylet", "gcs_server"} <= names and len(family) > 5, names
        of_head = [p for p in family if p.pid == lost.pid or p.name() in ("raylet", "gcs_server")]
        for process in of_head:
            process.kill()
        psutil.wait_procs(of_head, timeout=60)

        # Not restarted: what is left says so, and nobody is told that it trains.
        assert head.find_running() is None and head.find_lost() == lost
        shown = CliRunner().invoke(app, ["list"])
        assert f"`ringworld up` started at {lost.address} is gone" in " ".join(shown.stderr.split())
        wait_until(lambda: states.get(run_id).abandoned(), "its controller has missed the head")
        assert "no controller runs it any more" in states.get(run_id).to_status()["reason"]

        assert script(AGAIN, port=unused_ports[1]) == run_id
        assert members(lost.pid) == [], "nothing of the old cluster trains on"
        wait_until(lambda: states.get(run_id).terminal, "it ends")
    finally:
        head.down()

    final = states.get(run_id)
    assert (final.state, final.attempt) == (RunState.SUCCEEDED, 2), final
    done = effective_steps(read_run(home / "runs" / run_id).records)
    assert [step["step"] for step in done] == list(range(1, STEPS + 1))
    second = [step["step"] for step in done if step["attempt"] == 2]
    assert second[0] > 5 and (second[0] - 1) % 5 == 0, "it went on from a checkpoint"
    assert head.find_running() is None and head.find_lost() is None


@pytest.fixture
def unused_ports() -> tuple[int, int]:
    import socket

    with socket.socket() as one, socket.socket() as other:
        for listener in (one, other):
            listener.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def test_a_killed_command_leaves_no_gang_and_a_run_to_resume(home: Path) -> None:
    states = RunStates(home / "runs")
    environment = {**os.environ, **worker_environment()}
    command = [sys.executable, "-c", textwrap.dedent(ALONE)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as alone:
        try:
            wait_until(lambda: [r for r in states.all() if r.checkpoint], "it has a checkpoint")
        finally:
            alone.kill()

    try:
        trains = partial(any_named, alone.pid, ("ray::Controller", "ray::RingWorker"))
        wait_until(lambda: not trains(), "controller and gang have missed it")
        (left,) = states.all()
        assert left.abandoned()
        assert f"`ringworld resume {left.run_id}` continues it" in left.to_status()["reason"]
    finally:
        for process in members(alone.pid):  # Ray's own agents may take minutes
            process.kill()
