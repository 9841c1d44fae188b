"""On real video and real speeches, the quickstart's first two stages learn both modalities."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_both_modalities_beat_guessing_by_frequency(tmp_path: Path) -> None:
    """Held-out speeches and a held-out stretch of video, against the entropy of their tokens."""
    spec = yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text())
    spec["stages"] = spec["stages"][:2]
    spec["stages"][1]["steps"] = 30  # of 50: enough, and half a minute less
    spec["data"]["recipe"] = str(ROOT / "jobs" / "recipes" / "quickstart.yaml")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("ringworld")), "run", "job.yaml"],
        cwd=tmp_path,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    log = (tmp_path / "runs" / "quickstart-1" / "metrics.jsonl").read_text().splitlines()
    records = [yaml.safe_load(line) for line in log if '"validation"' in line]
    last = records[-1]
    for modality in ("text", "vision"):
        assert last[f"targets_{modality}"] > 1000
        # A clear margin: what is learned is context, not the frequencies.
        assert last[f"loss_{modality}"] < last[f"unigram_entropy_{modality}"] - 0.2, last
