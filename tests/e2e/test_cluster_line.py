"""up, submit, status, logs, stop, resume, down: a job that lives on without its client."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from conftest import Project

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_submitted_job_lives_without_its_client(project: Project) -> None:
    job = yaml.safe_load((project.folder / "job.yaml").read_text())
    (stage,) = job["stages"] = [stage for stage in job["stages"] if stage["name"] == "second"]
    del stage["parity"]
    job["recovery"] = {"stall_timeout": "10min"}
    (project.folder / "job.yaml").write_text(yaml.safe_dump(job))
    code, output = project.command(
        "up", "--cpus", "2", "--no-dashboard", "--port", str(free_port())
    )
    assert code == 0, output
    try:
        code, output = project.command("submit", "job.yaml")
        assert code == 0 and "small-1" in output
        ranks = [project.wait_for_pid("small-1", "second", rank) for rank in (0, 1)]
        project.wait_for_step("small-1", "second", 12)
        # However slow the commands are here, the job does not end before they do.
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        status = project.status("small-1")
        assert status["state"] == "RUNNING" and status["ring_size"] == 2
        assert {"job", "stage", "step", "attempt", "context_length", "checkpoint"} <= set(status)
        assert [(worker["rank"], worker["pid"]) for worker in status["workers"]] == list(
            enumerate(ranks)
        )
        assert all(w["node"] and w["device"] == "cpu" for w in status["workers"])

        code, output = project.command("submit", "job.yaml")
        assert code == 0 and "small-1" in output, "the same job, still active, is not run twice"

        code, output = project.command("stop", "small")
        assert code == 0, output
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        project.wait_for("STOPPED", lambda: project.status("small-1")["state"] == "STOPPED")
        code, output = project.command("logs", "small", "--rank", "1")
        assert code == 0 and output.strip()

        code, output = project.command("resume", "small-1")
        assert code == 0, output
        project.wait_for("SUCCEEDED", lambda: project.status("small-1")["state"] == "SUCCEEDED")
        code, output = project.command("list", "--json")
        listed = json.loads(output[output.index("[") :])
        assert [(row["run_id"], row["state"]) for row in listed] == [("small-1", "SUCCEEDED")]
    finally:
        code, output = project.command("down")
    assert code == 0, output
    assert project.processes() == []
