"""The line with its checkpoints on S3: a run whose worker dies, and where its secrets are not."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.store.opening import open_store

if TYPE_CHECKING:
    from conftest import Project

    from ringworld_platform.local_s3 import LocalS3

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 40
JOB = """
kind: train
name: cloud
model: {hidden_size: 32, ffn_size: 64, num_heads: 2, num_kv_heads: 1}
data: {recipe: recipe.yaml, cache: cache}
resources: {accelerator: cpu, workers: {min: 1, max: 2}}
checkpoint: {store: STORE, every: 5 steps}
stages:
- name: only
  context_length: 256
  rope_theta: 1e4
  steps: STEPS
  global_batch_tokens: 512
  mesh: {sequence_parallel: 2}
  mixture: {clips: 0.8, notes: 0.2}
  learning_rate: {peak: 3e-3}
"""


def command_lines(project: Project) -> str:
    """Of all that the project's command has started, as `ps` shows them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RINGWORLD_TEST_MARK") == project.mark:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return "\n".join(found)


def test_a_run_on_s3_survives_its_worker_and_keeps_its_secrets(
    project: Project, s3_server: LocalS3, s3_url: str
) -> None:
    job = project.folder / "cloud.yaml"
    job.write_text(JOB.replace("STORE", s3_url).replace("STEPS", str(STEPS)))
    process = project.start("run", "cloud.yaml")
    victim = project.wait_for_pid("cloud-1", "only", rank=1)
    shown = command_lines(project)
    project.wait_for_step("cloud-1", "only", 7)
    os.kill(victim, signal.SIGKILL)
    code, output = project.finish(process)
    assert code == 0, output

    status = project.status("cloud-1")
    assert (status["state"], status["attempt"]) == ("SUCCEEDED", 2)
    assert status["checkpoint"] == f"00-only/step-{STEPS:08d}"
    assert sorted(step for _, step in project.steps("cloud-1")) == list(range(1, STEPS + 1))
    # Steps that were done again saw the same samples: the first time and the second.
    done: dict[int, list[list[str]]] = {}
    for line in project.lines("cloud-1", "samples.jsonl"):
        done.setdefault(line["step"], []).append(line["sample_ids"])
    again = [ids for ids in done.values() if len(ids) > 1]
    assert again and all(first == second for first, second in again)

    # What lies on S3, and that only its records are here.
    store, run = open_store(s3_url), project.folder / "runs" / "cloud-1"
    # By its objects: SeaweedFS keeps the folder of the one that tried the store out.
    assert {info.key.partition("/")[0] for info in store.list()} == {"cloud-1"}
    claim = json.loads(store.get("cloud-1/run.json"))
    assert claim["uid"] == json.loads((run / "state.json").read_text())["uid"]
    assert store.get("cloud-1/spec.yaml") == (run / "spec.yaml").read_bytes()
    refs = committed(open_store(f"{s3_url}/cloud-1/checkpoints"))
    assert [ref.step for ref in refs] == [STEPS - 5, STEPS]
    assert not (run / "checkpoints").exists()
    assert run.stat().st_mode & 0o777 == 0o700

    # Nowhere in what the run has left, or has shown: neither key.
    secrets = (s3_server.credentials.secret_key, s3_server.credentials.access_key)
    texts = {"ps": shown, "output": output}
    for path in run.rglob("*"):
        if path.is_file():
            texts[path.name] = path.read_bytes().decode("utf-8", "replace")
    for name in (info.key for info in store.list() if not info.key.endswith(".bin")):
        texts[name] = store.get(name).decode()
    assert {"state.json", "mlflow.db", "rank-0.log", "events.jsonl"} <= set(texts)
    assert [name for name, text in texts.items() for key in secrets if key in text] == []
