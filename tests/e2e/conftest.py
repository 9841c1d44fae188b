"""A small project with real files: texts, a clip, a recipe and a job of three stages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest

RINGWORLD = str(Path(sys.executable).with_name("ringworld"))
MARK = "RINGWORLD_TEST_MARK"
WAIT_SECONDS = 300.0

RECIPE = """
kind: data
name: small
tokenizer: {train: {vocabulary_size: 300}}
codebook: {codebook_size: 32, frame_size: 16, patch_size: 4, iterations: 4}
videos:
  ball:
    path: ball.mkv
    captions:
    - {start: 0, end: 4, text: "A bright ball rolls to the right."}
    - {start: 4, end: 8, text: "A bright ball rolls on."}
    held_out: [{start: 6, end: 7}]
datasets:
  notes: {kind: text, files: ["notes-*.txt"], held_out: ["notes-9.txt"]}
  clips: {kind: video_text, videos: [ball], fps: 10, frames_per_clip: 5}
"""

JOB = """
kind: train
name: small
model: {hidden_size: 32, ffn_size: 64, num_heads: 2, num_kv_heads: 1}
data: {recipe: recipe.yaml, cache: cache}
resources: {accelerator: cpu, workers: {min: 1, max: 2}}
checkpoint: {store: file://runs, every: 10 steps}
defaults:
  learning_rate: {peak: 3e-3, warmup_steps: 2}
  validation_rows: 1
stages:
- name: first
  context_length: 256
  rope_theta: 1e4
  steps: 8
  global_batch_tokens: 512
  mesh: {sequence_parallel: 1, data_parallel: 2}
  mixture: {clips: 0.8, notes: 0.2}
  zero_stage: 1
- name: second
  context_length: 640
  rope_theta: 1e5
  steps: 80
  global_batch_tokens: 640
  mesh: {sequence_parallel: 2}
  mixture: {clips: 0.7, notes: 0.3}
  zero_stage: 3
  parity: {layers: 1, context_length: 640}
- name: third
  context_length: 1500
  rope_theta: 1e6
  steps: 6
  global_batch_tokens: 3000
  mesh: {sequence_parallel: {ring: 1, heads: 2}}
  mixture: {clips: 0.6, notes: 0.4}
  zero_stage: 2
"""


def write_clip(path: Path) -> None:
    """Eight seconds of a ball that rolls over a grey ground."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "bgr0"
        for index in range(80):
            pixels = np.full((48, 48, 3), 90, np.uint8)
            left = (index * 3) % 40
            pixels[16:26, left : left + 8] = (230, 200 - index, 40 + index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@dataclass
class Project:
    """A folder with a job, and the runs that commands started in it have made."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def environment(self) -> dict[str, str]:
        """Of every command: one thread, a home of its own, and a mark that children inherit."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        own = {"OMP_NUM_THREADS": "1", MARK: self.mark}
        # The niceness as in tests/conftest.py: a ring waits for its slowest rank.
        rays = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        return {**clean, **own, **rays, "HOME": str(self.folder), "COLUMNS": "100"}

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Start a command; its output goes to a file beside the job."""
        log = self.folder / f"{'-'.join(args[:1])}-{uuid.uuid4().hex[:6]}.log"
        process = subprocess.Popen(
            [RINGWORLD, *args],
            cwd=self.folder,
            env=self.environment(),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        process.log = log  # type: ignore[attr-defined]
        return process

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and output of a command."""
        try:
            code = process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no end within {WAIT_SECONDS} s:\n{process.log.read_text()}")
        return code, process.log.read_text()

    def command(self, *args: str) -> tuple[int, str]:
        """Run a command to its end."""
        return self.finish(self.start(*args))

    def lines(self, run_id: str, name: str) -> list[dict[str, Any]]:
        """The whole lines of one of a run's logs."""
        path = self.folder / "runs" / run_id / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def status(self, run_id: str) -> dict[str, Any]:
        """What `ringworld status --json` says."""
        code, text = self.command("status", run_id, "--json")
        assert code == 0, text
        found: dict[str, Any] = json.loads(text[text.index("{") :])
        return found

    def steps(self, run_id: str) -> dict[tuple[str, int], dict[str, Any]]:
        """The last record of every step: a step that was repeated counts once."""
        records = self.lines(run_id, "metrics.jsonl")
        return {(r["stage"], r["step"]): r for r in records if r["kind"] == "step"}

    def samples(self, run_id: str) -> dict[tuple[str, int], list[str]]:
        """The sample ids of every step, as it was last done."""
        lines = self.lines(run_id, "samples.jsonl")
        return {(line["stage"], line["step"]): line["sample_ids"] for line in lines}

    def wait_for(self, what: str, check: Callable[[], Any]) -> Any:
        """Poll until ``check`` gives something."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            if found := check():
                return found
            time.sleep(0.05)
        return pytest.fail(f"{what}: not within {WAIT_SECONDS} s")

    def wait_for_step(self, run_id: str, stage: str, step: int) -> None:
        """Wait until the run has done a step."""
        self.wait_for(f"step {step} of {stage}", lambda: (stage, step) in self.steps(run_id))

    def wait_for_pid(self, run_id: str, stage: str, rank: int, attempt: int = 1) -> int:
        """Wait until a rank has joined a stage's gang.

        Without a command, whose start takes as long as a small stage does.
        """

        def pid() -> int | None:
            for line in self.lines(run_id, f"logs/rank-{rank}.log"):
                if (line["stage"], line["attempt"]) == (stage, attempt):
                    if said := re.search(r"\bpid (\d+)\) joined", line["message"]):
                        return int(said[1])
            return None

        found: int = self.wait_for(f"rank {rank} in {stage}", pid)
        return found

    def processes(self) -> list[str]:
        """Command lines of all living processes that a command of this project has started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != "zombie":
                    found.append(" ".join(process.cmdline())[:120])
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    for index in range(10):
        order = np.random.default_rng(index).permutation(40)
        text = " ".join(f"Note {k} says that the ring of world {k % 7} holds." for k in order)
        (folder / f"notes-{index}.txt").write_text(text)
    write_clip(folder / "ball.mkv")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "job.yaml").write_text(JOB)
    made = Project(folder)
    yield made
    left = made.processes()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == made.mark:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    assert not left, f"processes were left behind: {left}"
