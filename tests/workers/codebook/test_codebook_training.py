"""Training: it learns, its codebook does not collapse, and a kill changes nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringworld_jobs.codebook import CodebookJob
from ringworld_model.vision.codes import nearest_codes
from ringworld_model.vision.frame_tokenizer import load_frame_tokenizer
from ringworld_model.vision.frames import psnr
from ringworld_workers.codebook.clips import gather_clips
from ringworld_workers.codebook.moving_codebook import MovingCodebook
from ringworld_workers.codebook.trainer import WARMUP_STEPS
from ringworld_workers.codebook.training import train_codebook
from ringworld_workers.codebook.update import Update
from ringworld_workers.data.files import DataError


def run(job: dict[str, Any], base: Path, out: Path, stop_at: int | None = None) -> list[Update]:
    """Train here; ``stop_at``: ask it to stop after so many steps of this process."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_at

    return list(train_codebook(CodebookJob(**job), base, out, should_stop))


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics' lines without their times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_what_is_trained_reconstructs_clips_that_it_never_saw(
    job: dict[str, Any], tmp_path: Path
) -> None:
    job["videos"]["one"]["held_out"] = [{"start": 2, "end": 4}]
    job["training"] |= {"steps": 120, "learning_rate": 5e-3, "evaluate_every_steps": 20}
    result = run(job, tmp_path, tmp_path / "out")[-1].result
    assert result is not None
    out = tmp_path / "out"
    clips = gather_clips(CodebookJob(**job), tmp_path, tmp_path / "again")
    frames = np.array(clips.frames("held_out"))
    tokenizer = load_frame_tokenizer(out)
    codes = tokenizer.encode(frames)
    assert codes.shape == (20, 64)
    assert psnr(tokenizer.decode(codes), frames) == pytest.approx(result["held_out"]["psnr_db"])
    grey = np.full_like(frames, int(frames.mean()))
    assert result["held_out"]["psnr_db"] > psnr(grey, frames) + 5
    assert result["held_out"]["codes_used"] == len(np.unique(codes)) >= 12
    assert result["tokenizer"]["digest"] == tokenizer.digest()
    assert list(result["held_out"]["clips"]) == ["one 2-4 s"]
    assert result["patch_codebook"]["psnr_db"] > psnr(grey, frames)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "frames").exists() and not (out / "state.pt").exists()
    # Once more: it is there already, and nothing is trained.
    assert [update.phase for update in run(job, tmp_path, out)] == ["done"]


_KILLED = """
import os, signal, sys, yaml
from pathlib import Path
import torch
from ringworld_jobs.codebook import CodebookJob
from ringworld_workers.codebook.training import train_codebook
torch.set_num_threads(1)
steps = 0
def should_stop():
    global steps
    steps += 1
    if steps == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return False
base, out = map(Path, sys.argv[1:])
job = CodebookJob(**yaml.safe_load((base / "tiny.yaml").read_text()))
list(train_codebook(job, base, out, should_stop))
"""


def test_stopping_or_killing_and_going_on_changes_nothing(
    job: dict[str, Any], save: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    undisturbed = run(job, tmp_path, tmp_path / "whole")[-1].result
    assert undisturbed is not None
    assert len(metrics(tmp_path / "whole")) == 24
    # Before the codebook starts (a quarter of the steps), and after.
    for stop_at in (3, 14):
        assert run(job, tmp_path, tmp_path / "stopped", stop_at)[-1].phase == "stopped"
    save(job)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(tmp_path / "killed")],
        timeout=90,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert state["trainer"]["step"] == 10
    for name in ("stopped", "killed"):
        resumed = run(job, tmp_path, tmp_path / name)[-1].result
        assert resumed is not None
        assert resumed["tokenizer"]["digest"] == undisturbed["tokenizer"]["digest"]
        assert metrics(tmp_path / name) == metrics(tmp_path / "whole")


def test_a_folder_belongs_to_one_job(job: dict[str, Any], tmp_path: Path) -> None:
    run(job, tmp_path, tmp_path / "out", stop_at=2)
    # How long and how often it saves is no part of what it computes.
    job["training"] |= {"save_every": "5 steps"}
    run(job, tmp_path, tmp_path / "out", stop_at=2)
    job["training"] |= {"learning_rate": 1e-3}
    with pytest.raises(DataError, match="holds the training of another job"):
        run(job, tmp_path, tmp_path / "out")
    (tmp_path / "out" / "state.pt").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"state.pt is no state of a training.*remove it"):
        run(job, tmp_path, tmp_path / "out")


def test_the_rate_falls_with_a_time_limit(job: dict[str, Any], tmp_path: Path) -> None:
    job["training"] |= {"steps": 10**6, "time_limit": "2s"}
    last = run(job, tmp_path, tmp_path / "out")[-1]
    assert last.result is not None
    assert last.result["steps"] < 10**5
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]

    def rate(seconds: float) -> float:
        return 2e-3 * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, seconds / 2))))

    # Each step's rate lies between those of the moments at which its neighbours were written.
    for before, after in itertools.pairwise(lines[WARMUP_STEPS:]):
        assert rate(after["seconds"]) - 1e-6 <= after["learning_rate"]
        assert after["learning_rate"] <= rate(before["seconds"]) + 1e-5


def test_a_rate_that_is_too_high_is_named(job: dict[str, Any], tmp_path: Path) -> None:
    job["training"] |= {"learning_rate": 1e30}
    with pytest.raises(DataError, match=r"lower training.learning_rate \(1e\+30\)"):
        run(job, tmp_path, tmp_path / "out")


def test_dead_codes_come_back_and_codes_are_means() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0], [8, 0], [0, 8], [8, 8]])
    vectors = centres.repeat(50, 1) + torch.randn(200, 2, generator=generator) * 0.1
    table = torch.full((4, 2), 100.0)
    # Where all codes but one are far from everything.
    table[0] = 0
    codebook = MovingCodebook(table)
    codebook.sums.copy_(table)
    codebook.counts.fill_(1.0)
    revived = 0
    for _ in range(400):
        codes, _ = nearest_codes(vectors, table)
        revived += codebook.follow(vectors, codes, generator)
    assert revived >= 3
    # Each centre has its code now.
    _, distances = nearest_codes(centres, table)
    assert distances.max() < 0.01
