"""A real MLflow server, to be killed, frozen and begun anew; and what is on it.

As a program it is what servers are forked from: MLflow takes seconds to import, and this is done
once. A fork has used nothing of it yet, and so is as good as a server that was started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

WAIT_SECONDS = 120.0
Point = tuple[str, int, float, int]
"""Name, step, value, milliseconds."""


class RealMlflow:
    """MLflow's server with a sqlite file and artifacts of its own."""

    def __init__(self, folder: Path, empty_store: bytes) -> None:
        """Start none yet.

        Args:
            folder: for its files.
            empty_store: a database of MLflow's; to make one takes seconds.
        """
        self._database = folder / "mlflow.db"
        self._empty_store = empty_store
        self._pid = 0
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            self._port = int(holder.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self._port}"
        # What `mlflow server` gives to the processes that serve.
        environment = {
            **os.environ,
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{self._database}",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self._forks = subprocess.Popen(
                [sys.executable, __file__, str(self._port)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )
        self.empty()

    def start(self) -> None:
        """Start it; ``wait`` says when it answers."""
        assert self._forks.stdin is not None and self._forks.stdout is not None
        self._forks.stdin.write("start\n")
        line = self._forks.stdout.readline()
        assert line, self._log.read_text()
        self._pid = int(line)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            threading.Event().wait(0.02)
        raise AssertionError(self._log.read_text())

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self._pid, number)

    def kill(self) -> None:
        """End it as a crash does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
            deadline = time.monotonic() + WAIT_SECONDS
            while time.monotonic() < deadline:
                os.kill(self._pid, 0)
                threading.Event().wait(0.01)

    def empty(self) -> None:
        """Lose everything; only while it is down."""
        for leftover in self._database.parent.glob("mlflow.db*"):
            leftover.unlink()
        self._database.write_bytes(self._empty_store)

    def close(self) -> None:
        """End all."""
        if self._pid:
            self.kill()
        self._forks.kill()
        self._forks.wait(WAIT_SECONDS)


def serve_forks(port: int) -> None:
    """Fork a server for each line of stdin, and print its process id."""
    import uvicorn
    from mlflow.server.fastapi_app import app

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are gone at once
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def points_of_run(client: Any, run: str) -> Counter[Point]:
    """Every point of a run on the server, with how often it is there."""
    names = client.get_run(run).data.metrics
    return Counter(
        (name, point.step, point.value, point.timestamp)
        for name in names
        for point in client.get_metric_history(run, name)
    )


def points_of_log(records: list[dict[str, Any]], stage: int | None) -> Counter[Point]:
    """Every point that a stage's run (None: the job's) should have, once each."""
    about = {"kind", "stage", "stage_index", "step", "global_step", "attempt", "time"}
    found: set[Point] = set()
    for record in records:
        if stage not in (None, record["stage_index"]):
            continue
        kind, when = record["kind"], int(record["time"] * 1000)
        if kind in ("stage_start", "stage_end"):
            continue
        for name, value in record.items():
            if name not in about and type(value) in (int, float):
                series = name if kind == "step" else f"{kind}/{name}"
                found.add((series, record["global_step"], float(value), when))
    return Counter(found)


if __name__ == "__main__":
    serve_forks(int(sys.argv[1]))
