"""The GPU benchmark runs from end to end where there is no GPU, at sizes that prove nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_gpu_benchmark_runs_dry(tmp_path):
    script = [sys.executable, ROOT / "benchmarks/ring_gpu.py", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*script, "--out", tmp_path / "figures"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "model"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["failed"] == []
    assert all(result["rows"].values()), "every section has figures"
    assert all(row["pass"] for row in result["rows"]["right"])
    table = (tmp_path / "figures.md").read_text()
    assert "flash, blockwise" in table and "a dry run" in table
