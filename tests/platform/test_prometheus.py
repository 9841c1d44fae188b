"""A real Prometheus scrapes a running job, by the file that we write for it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from mini_jobs import mini_client, mini_job, wait_until, worker_environment

from ringworld_platform import grafana_dashboard
from ringworld_platform.cluster import local_cluster
from ringworld_platform.deploy_files import Values, render, write
from ringworld_platform.head import token_file
from ringworld_platform.telemetry_table import all_series

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.prometheus,
    pytest.mark.skipif(
        PROMETHEUS is None, reason="no prometheus binary here: apt-get install prometheus"
    ),
]

SOON = 120.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """Start it with the folder's configuration; gives its address."""
    url = f"127.0.0.1:{free_port()}"
    command = [str(PROMETHEUS), f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={url}"]
    with (folder / "prometheus.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(lambda: is_ready(f"http://{url}"), f"{folder}/prometheus.log", SOON)
        yield f"http://{url}"
    finally:
        process.kill()
        process.wait()


def is_ready(server: str) -> bool:
    try:
        with urlopen(f"{server}/-/ready", timeout=30) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def ask(server: str, expression: str) -> list[dict[str, Any]]:
    """The lines that an expression has now."""
    with urlopen(f"{server}/api/v1/query?query={quote(expression)}", timeout=30) as reply:
        answer = json.load(reply)
    assert answer["status"] == "success"
    return list(answer["data"]["result"])


def number(server: str, expression: str) -> float | None:
    """The value of the one line that an expression has."""
    lines = ask(server, expression)
    return float(lines[0]["value"][1]) if len(lines) == 1 else None


def panel_expressions(run: str) -> list[str]:
    """What the dashboard's panels ask, of one run."""
    board = json.loads(grafana_dashboard.FILE.read_text(encoding="utf-8"))
    asked = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
    filled = [re.sub(r"\$__(rate_interval|range)", "1m", each) for each in asked]
    return [each.replace("$run", run) for each in filled]


def test_it_sees_a_job_its_ranks_and_the_controller_until_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's own setting, ten seconds if left alone.
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    known = {series.exported for series in all_series()}
    with (
        local_cluster(num_cpus=2, dashboard=True, env_vars=worker_environment()) as cluster,
        mini_client(tmp_path / "runs") as client,
    ):
        run = client.submit(mini_job(tmp_path, stages=(("1k", 2, 100_000),), workers=(2, 2)))
        assert cluster.dashboard_url is not None
        values = Values(
            folder=str(tmp_path), dashboard=cluster.dashboard_url, token_file=str(token_file())
        )
        files = render("observability", values)
        scraped = files["prometheus.yml"].replace(": 10s", ": 1s")
        write({"prometheus.yml": scraped}, tmp_path)
        with prometheus(tmp_path) as server:
            wait_until(lambda: number(server, "ray_ringworld_loss"), "its loss", SOON)
            wait_until(lambda: len(ask(server, "ray_ringworld_rank_step")) == 2, "ranks", SOON)
            (loss,) = ask(server, "ray_ringworld_loss")
            assert (loss["metric"]["run"], loss["metric"]["stage"]) == (run, "1k")
            ranks = {line["metric"]["rank"] for line in ask(server, "ray_ringworld_rank_step")}
            assert ranks == {"0", "1"}
            assert number(server, "ray_ringworld_context_length_tokens") == 1024
            assert number(server, "ray_ringworld_workers") == 2
            assert number(server, 'ray_ringworld_jobs{state="RUNNING"}') == 1
            memory = ask(server, "ray_ringworld_rank_memory_host_bytes > 10e6")
            assert len(memory) == 2
            wait_until(lambda: number(server, "ray_ringworld_trained_steps_total"), "steps", SOON)
            seen = {
                line["metric"]["__name__"]
                for line in ask(server, 'count by (__name__) ({__name__=~"ray_ringworld_.*"})')
            }
            assert len(seen) > 20
            assert seen <= known
            # What this miniature reports must be in its panels; a rate wants two values.
            for expression in panel_expressions(run):
                if set(re.findall(r"ray_ringworld_[a-z_]+", expression)) <= seen:
                    wait_until(partial(ask, server, expression), expression, SOON)
            client.stop(run)
            wait_until(
                lambda: number(server, 'ray_ringworld_jobs{state="STOPPED"}') == 1, "its end", SOON
            )
            gone = f'{{__name__=~"ray_ringworld_.*", run="{run}"}}'
            wait_until(lambda: not ask(server, gone), "the run's series to go", SOON)
