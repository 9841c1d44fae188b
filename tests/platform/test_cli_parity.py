"""`ringworld parity` on a small job: table, file, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

from ringworld_platform.cli import app

RINGWORLD = [sys.executable, "-c", "from ringworld_platform.cli import main; main()"]
WORDS = "ring world token frame clip drum lamp guitar nation union state law people year".split()
SMALL = ("--ring-sizes", "2,1x2", "--layers", "1")


def ringworld(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "TERM": "dumb"})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    for index in range(4):
        words = np.random.default_rng(index).choice(WORDS, 150)
        (folder / f"notes-{index}.txt").write_text(" ".join(words))
    recipe = {
        "kind": "data",
        "name": "notes",
        "tokenizer": {"train": {"vocabulary_size": 300}},
        "datasets": {"notes": {"kind": "text", "files": ["notes-*.txt"]}},
    }
    spec = {
        "kind": "train",
        "name": "small",
        "model": {"hidden_size": 32, "ffn_size": 48, "num_heads": 2, "num_kv_heads": 1},
        "data": {"recipe": "recipe.yaml", "cache": str(folder / "cache")},
        "resources": {"accelerator": "cpu", "workers": {"max": 2}},
        "defaults": {
            "learning_rate": {"peak": 1e-3},
            "mixture": {"notes": 1},
            "steps": 1,
            "rope_theta": 1e4,
            "global_batch_tokens": 640,
        },
        "stages": [{"name": "only", "context_length": 640}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    return folder / "job.yaml"


def test_a_right_ring_passes_and_is_kept_with_the_run(job: Path, recorded_run: Path) -> None:
    runs = str(recorded_run.parent)
    result = ringworld("parity", str(job), *SMALL, "--runs", runs, "--run", recorded_run.name)
    assert result.exit_code == 0, result.output
    assert "stage only" in result.stderr and "the first 1 of 2 layers" in result.stderr
    for text in ("packed", "dense", "at most", "pass", "every ring gives one device's loss"):
        assert text in result.stdout, result.stdout
    assert max(map(len, result.stdout.splitlines()[:4])) <= 80
    written = json.loads((recorded_run / "parity.json").read_text())
    kept = written["stages"]["only"]["command"]
    assert (
        written["passed"] and kept["passed"] and kept["job"] == "small" and kept["stage"] == "only"
    )
    assert [(r["packing"], r["ring_size"], r["heads_size"]) for r in kept["rings"]] == [
        (packing, *shape) for packing in ("packed", "dense") for shape in ((1, 2), (2, 1))
    ]
    assert all(0 <= ring["worst_error"] < 1e-5 for ring in kept["rings"])


def test_over_tolerance_is_a_failure_in_json_too(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ringworld_workers.parity import compare, report
    from ringworld_workers.parity.case import ParityCase

    def off_by_a_percent(case: ParityCase) -> report.ParityReport:
        ring = report.RingParity(
            "packed",
            2,
            "zigzag",
            "cpu",
            loss=1.0,
            grad_norm=1.0,
            loss_difference=0.0,
            grad_norm_difference=0.0,
            gradient_errors={"norm.weight": 0.0, "layers.0.attention.k_proj.weight": 0.01},
        )
        return report.ParityReport(case, [ring], 1.0)

    monkeypatch.setattr(compare, "run_parity", off_by_a_percent)
    result = ringworld("parity", str(job), "--output", str(tmp_path / "shown.json"))
    assert result.exit_code == 1, result.output
    assert "FAIL" in result.stdout and "layers.0.attention" in result.stdout
    assert "1 of 1 comparisons are over the tolerance" in result.stdout
    output = tmp_path / "found.json"
    result = ringworld("parity", str(job), "--output", str(output), "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is False
    assert found["rings"][0]["passed"] is False
    assert json.loads(output.read_text())["rings"] == found["rings"]


def test_a_rank_that_fails_is_shown(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringworld_workers.parity import compare
    from ringworld_workers.testing import DistributedError

    def broken(case: object) -> None:
        raise DistributedError("rank 1 raised:\nMemoryError")

    monkeypatch.setattr(compare, "run_parity", broken)
    result = ringworld("parity", str(job))
    assert result.exit_code == 1
    assert "error: rank 1 raised:\nMemoryError" in result.stderr
    assert "internal error" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ring-sizes", "2,x"), "write sizes such as 1,2,4"),
        (("--ring-sizes", "0"), "write sizes such as 1,2,4"),
        (("--ring-sizes", "2x"), "write sizes such as 1,2,4 or 2x2"),
        (("--stage", "second"), "is none of only"),
        (("--context-length", "4K"), "did you mean 4Ki?"),
        (("--run", "nowhere", "--runs", "nowhere"), "no run or job 'nowhere'"),
    ],
)
def test_mistakes_are_the_users(job: Path, arguments: tuple[str, ...], message: str) -> None:
    result = ringworld("parity", str(job), *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_ctrl_c_leaves_no_process(job: Path, tmp_path: Path) -> None:
    command = [*RINGWORLD, "parity", str(job), "--ring-sizes", "2"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it puts in the background deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        parent = psutil.Process(process.pid)
        deadline = time.monotonic() + 120
        ranks: list[psutil.Process] = []
        while len(ranks) < 2:
            assert process.poll() is None and time.monotonic() < deadline, process.poll()
            with suppress(psutil.NoSuchProcess):  # a child may end while it is looked at
                started = parent.children()
                ranks = [child for child in started if "spawn_main" in " ".join(child.cmdline())]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert not list(tmp_path.glob("ringworld-ranks-*"))
