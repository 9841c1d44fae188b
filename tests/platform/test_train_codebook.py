"""`data train-codebook`: in this process, and as a task of a Ray cluster."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from ringworld_jobs.load import load_codebook
from ringworld_platform import cluster
from ringworld_platform.cli import app
from ringworld_platform.commands.train_codebook import _on_cluster
from ringworld_workers.data.files import DataError


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codebook")
    generator = np.random.default_rng(0)
    with av.open(str(folder / "film.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "bgr0"
        for _ in range(40):
            pixels = generator.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    job: dict[str, Any] = {
        "kind": "codebook",
        "name": "tiny",
        "fps": 10,
        "videos": {"film": {"path": "film.mkv", "held_out": [{"start": 3, "end": 4}]}},
        "shape": {
            "frame_size": 16,
            "channels": 8,
            "multipliers": [1, 2],
            "latent_channels": 4,
            "codebook_size": 16,
        },
        "training": {"steps": 20, "batch_crops": 4, "evaluate_every_steps": 10},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(job))
    return folder / "tiny.yaml"


def ringworld(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


def test_training_here(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checked = ringworld("validate", str(spec))
    assert checked.exit_code == 0
    assert f"ringworld data train-codebook {spec}" in checked.output.replace("\n", " ")
    trained = ringworld("data", "train-codebook", str(spec))
    assert trained.exit_code == 0, trained.output
    out = tmp_path / ".ringworld/codebooks/tiny"
    quality = json.loads((out / "result.json").read_text())["held_out"]
    assert f"tiny: {quality['psnr_db']:.2f} dB on 10 held-out frames" in trained.output
    assert "patches (k-means) of as many codes: " in trained.output
    assert (out / "codebook/config.json").is_file()
    other = tmp_path / "other.yaml"
    other.write_text(spec.read_text().replace("film.mkv", str(spec.parent / "film.mkv")))
    refused = ringworld("data", "train-codebook", str(other), "--out", str(out))
    assert refused.exit_code == 1
    assert "holds the training of another job" in refused.output


@pytest.mark.ray
def test_training_on_a_cluster(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, out = load_codebook(spec), tmp_path / "out"
    with cluster.local_cluster(num_cpus=1, env_vars={"OMP_NUM_THREADS": "1"}):
        stop = threading.Event()
        stop.set()
        stopped = list(_on_cluster(job, spec.parent, out, stop))
        assert stopped[-1].phase == "stopped"
        assert 0 < stopped[-1].step < 20
        assert not (out / "stop").exists()
        updates = list(_on_cluster(job, spec.parent, out, threading.Event()))
        assert updates[-1].result is not None
        assert updates[-1].result["steps"] == 20
        changed = job.model_copy(update={"seed": 1})
        with pytest.raises(DataError, match="holds the training of another job"):
            list(_on_cluster(changed, spec.parent, out, threading.Event()))
    assert os.path.isfile(out / "report.png")
