"""`ringworld serve` on Ray Serve: a ring of two, a rank killed, and its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import openai
import psutil
import pytest
from served_model import write_folder

SECONDS = 200.0

pytestmark = pytest.mark.ray


def until(reached: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := reached()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def rank_of(server: psutil.Process) -> psutil.Process | None:
    """The process of the ring's second rank."""
    for process in server.children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::Rank"):
                return process
        except (psutil.Error, IndexError):
            continue
    return None


def listeners(server: psutil.Process) -> set[tuple[str, int]]:
    found = set()
    for process in [server, *server.children(recursive=True)]:
        try:
            sockets = process.net_connections()
        except psutil.Error:
            continue
        found |= {tuple(s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


def check_open_ports(server: psutil.Process) -> None:
    """Ray Serve's replica takes calls on every interface, but none without Ray's token."""
    others = [port for host, port in listeners(server) if not host.endswith("127.0.0.1")]
    assert len(others) <= 1
    for port in others:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_ring_answers_and_a_lost_rank_is_told(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 24)
    key.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    weights = write_folder(tmp_path / "weights")
    command = [sys.executable, "-m", "ringworld_platform", "serve", str(weights), "--ring", "2"]
    command += [f"--port={port}", f"--api-key-file={key}", "--device=cpu", "--name=tiny"]
    environment = os.environ | {"HOME": str(tmp_path)}
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        until(lambda: "Ctrl-C stops it" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        server = psutil.Process(process.pid)
        check_open_ports(server)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="k" * 24,
            max_retries=0,
            timeout=SECONDS,
        )
        asked: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "the king"}],
            "temperature": 0,
        }
        before = client.chat.completions.create(**asked, max_tokens=8).choices[0]
        assert before.finish_reason == "length"
        stream = iter(client.chat.completions.create(**asked, max_tokens=1900, stream=True))
        next(stream)
        rank = rank_of(server)
        assert rank is not None
        rank.kill()
        with pytest.raises(openai.APIError, match="rank 1 of the ring is lost"):
            list(stream)
        # Said by the replica's health, by which Ray Serve makes the ring anew.
        until(lambda: re.search(r"(failed|loading|gone)", log.read_text().partition("Ctrl-C")[2]))
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) in (0, 130)
        said = log.read_text()
        assert re.search(r"curl http://127\.0\.0\.1:\d+/v1/chat/completions", said)
        assert "k" * 24 not in said
        until(lambda: not psutil.pid_exists(rank.pid))
    finally:
        process.kill()
        process.wait(SECONDS)
