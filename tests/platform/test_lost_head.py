"""The head of `ringworld up` is killed, and another one goes on with its runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mini_jobs import wait_until, worker_environment
from typer.testing import CliRunner

from ringworld_platform import head
from ringworld_platform.cli import app
from ringworld_platform.run_records import effective_steps, read_run
from ringworld_platform.run_state import RunState, RunStates

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

STEPS = 120
START = """
    from mini_jobs import LOGGED, mini_job
    from pathlib import Path
    from ringworld_platform import cluster, head
    from ringworld_platform.client import Client
    head.up(num_cpus=2, port={port}, dashboard=False)
    cluster.connect()
    spec = mini_job(Path("runs").absolute(), stages=(("1k", 2, {steps}),), step_seconds=0.05)
    client = Client.attach(Path("elsewhere"), runner=LOGGED, roots_file="~/.ringworld/runs.json")
    print(client.submit(spec))
"""
AGAIN = """
    from mini_jobs import LOGGED
    from ringworld_platform import head
    from ringworld_platform.going_on import go_on
    head.up(num_cpus=2, port={port}, dashboard=False)
    print(*go_on(runner=LOGGED))
"""


def marked(mark: str) -> list[psutil.Process]:
    """What the cluster of that mark has started and is alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(head.MARK) == mark and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


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
            timeout=110,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_another_head_goes_on_where_a_killed_one_was(
    home: Path, script: Callable[..., str], unused_ports: tuple[int, int]
) -> None:
    states, record = RunStates(home / "runs"), home / ".ringworld" / "cluster.json"
    try:
        run_id = script(START, port=unused_ports[0], steps=STEPS)
        wait_until(lambda: states.get(run_id).step >= 8, "it has a checkpoint")
        mark, lost = json.loads(record.read_text())["mark"], head.find_running()
        assert lost is not None and head.find_lost() is None
        family = marked(mark)
        assert len(family) > 4, "head, gcs, raylet, controller, two workers"
        of_head = [p for p in family if p.pid == lost.pid or p.name() in ("raylet", "gcs_server")]
        for process in of_head:
            process.kill()
        psutil.wait_procs(of_head, timeout=10)

        # Not restarted: what is left says so, and nobody is told that it trains.
        assert head.find_running() is None and head.find_lost() == lost
        shown = CliRunner().invoke(app, ["list"])
        assert f"`ringworld up` started at {lost.address} is gone" in " ".join(shown.stderr.split())
        wait_until(lambda: states.get(run_id).abandoned(), "its controller has missed the head")
        assert "no controller runs it any more" in states.get(run_id).to_status()["reason"]

        assert script(AGAIN, port=unused_ports[1]) == run_id
        assert marked(mark) == [], "nothing of the old cluster trains on"
        wait_until(lambda: states.get(run_id).terminal, "it ends", 120.0)
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
