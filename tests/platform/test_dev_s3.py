"""`ringworld dev s3`: a real server for a shell or a command, gone when it is told to go."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from ringworld_platform import local_s3
from ringworld_platform.cli import app
from ringworld_platform.errors import PlatformError
from ringworld_platform.local_s3 import LocalS3

pytestmark = pytest.mark.timeout(400)

Start = Callable[..., subprocess.Popen[str]]

RINGWORLD = str(Path(sys.executable).with_name("ringworld"))
JOBS = Path(__file__).resolve().parents[2] / "jobs"
WAIT_SECONDS = 120.0
ROUND_TRIP = """
import os, sys
from ringworld_workers.store.opening import open_store
store = open_store("s3://runs/x")
store.put("a", [b"hello"])
assert store.get("a") == b"hello"
assert "AWS_SESSION_TOKEN" not in os.environ
sys.exit(7)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command; whatever a test does, nothing of it is left."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [RINGWORLD, "dev", "s3", "--data", "s3", *arguments],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "100", "AWS_SESSION_TOKEN": "of somebody else"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()  # it stops its server first
            process.communicate(timeout=WAIT_SECONDS)


def servers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children() if "weed" in p.name()]


def test_a_command_gets_the_server_and_gives_its_exit_code(tmp_path: Path, start: Start) -> None:
    process = start("--", sys.executable, "-c", ROUND_TRIP)
    said, notes = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 7, notes
    assert said == "" and "S3 at http://127.0.0.1:" in notes
    # What it holds and its credentials are there again, and only for its owner.
    assert stat.S_IMODE((tmp_path / "s3").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "s3/s3.json").stat().st_mode) == 0o600
    with LocalS3(tmp_path / "s3") as server:
        server.start("runs")
        with pytest.raises(PlatformError, match=rf"\(process {server.pid}\); stop that one"):
            LocalS3(tmp_path / "s3").start()
        assert not list(Path("/tmp").glob(f"*-{server.port + 1}.sock"))


def test_a_port_that_is_gone_by_then_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = local_s3._free_ports
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = {**found(None), "filer.port": other.getsockname()[1]}
        answers = [taken]
        monkeypatch.setattr(
            local_s3, "_free_ports", lambda wanted: answers.pop() if answers else found(wanted)
        )
        with LocalS3(tmp_path / "s3") as server:
            server.start("runs")
            assert not answers and server._ports != taken


def test_it_stays_until_ctrl_c_and_prints_what_a_shell_needs(tmp_path: Path, start: Start) -> None:
    process = start("--env-file", "s3.env")
    env_file = tmp_path / "s3.env"
    deadline = time.monotonic() + WAIT_SECONDS
    while not (env_file.exists() and env_file.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    (server,) = servers(process)
    secret = re.search(r"AWS_SECRET_ACCESS_KEY='?([^'\n]+)", env_file.read_text())
    assert secret is not None
    family = [psutil.Process(process.pid), server]
    assert all(secret[1] not in " ".join(member.cmdline()) for member in family)
    script = f". ./s3.env; exec {sys.executable} -c '{ROUND_TRIP}'"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, timeout=WAIT_SECONDS)
    assert done.returncode == 7
    process.send_signal(signal.SIGINT)
    said, notes = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, notes
    assert secret[1] not in said + notes
    assert not server.is_running()


def test_a_command_that_is_told_to_end_takes_the_server_with_it(start: Start) -> None:
    code = "import time; print('up', flush=True); time.sleep(600)"
    process = start("--", sys.executable, "-c", code)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    (server,) = servers(process)
    process.terminate()
    assert process.wait(WAIT_SECONDS) == 128 + signal.SIGTERM
    assert not server.is_running()


def test_mistakes_are_said_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["dev", "s3", *arguments], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    assert run("--bucket", "My_Runs") == (2, run("--bucket", "My_Runs")[1])
    assert "did you mean my-runs?" in run("--bucket", "My_Runs")[1]
    code, said = run("--", "no-such-program-here", "x")
    assert code == 127 and "there is no program no-such-program-here" in said
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    code, said = run()
    assert code == 1 and "pip install 'ringworld[s3-server]'" in said
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_on_s3_is_the_quickstart() -> None:
    ours, theirs = (
        yaml.safe_load((JOBS / name).read_text())
        for name in ("quickstart-s3.yaml", "quickstart.yaml")
    )
    assert ours.pop("name") == "quickstart-s3" and theirs.pop("name") == "quickstart"
    assert ours["checkpoint"].pop("store") == "s3://runs/ringworld"
    assert theirs["checkpoint"].pop("store") == "file://runs"
    assert ours == theirs
