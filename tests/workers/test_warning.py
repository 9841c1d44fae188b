"""SIGTERM at a worker: a notice the first time, the end the second."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time, types
from ringworld_workers.actor import RingWorker

signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # as Ray's own does
worker = RingWorker("m:train", "m:build")
if "training" in sys.argv:
    worker._job = types.SimpleNamespace(device="cpu")
    worker.request_stop()  # by the controller, which has heard of the drained node
os.kill(os.getpid(), signal.SIGTERM)
while not any(entry.kind == "event" for entry in worker.drain(0).entries):
    time.sleep(0.01)
print("saves", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("state", "said"), [("training", "saves\n"), ("idle", "")])
def test_a_worker_that_is_saving_is_not_ended_by_a_notice(state: str, said: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, state], capture_output=True, text=True, timeout=100
    )
    assert (ran.returncode, ran.stdout) == (3, said), ran.stderr
