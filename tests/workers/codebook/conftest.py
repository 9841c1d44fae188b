"""Two small clips and a codebook job over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml

SHAPE = {
    "frame_size": 16,
    "channels": 8,
    "multipliers": [1, 2],
    "latent_channels": 4,
    "codebook_size": 16,
}
TRAINING = {"steps": 24, "batch_crops": 4, "evaluate_every_steps": 8, "save_every": "10 steps"}


def _write(path: Path, frames: int, seed: int, red_from: int = 10**6) -> None:
    """A square that moves over a grey ramp, 10 frames a second, lossless; red from some frame."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(40, 200, 32)[None, :, None].repeat(32, 0).repeat(3, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "bgr0"
        for number in range(frames):
            picture = ramp + generator.integers(-20, 20)
            y, x = generator.integers(0, 24, 2)
            picture[y : y + 8, x : x + 8] = 240
            if number >= red_from:
                picture[..., 1:] = 0
            pixels = picture.clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """The job's mapping; its clips lie in ``tmp_path``. Two seconds of ``one`` are held out."""
    _write(tmp_path / "one.mkv", 60, 0, red_from=40)
    _write(tmp_path / "two.mkv", 30, 1)
    return {
        "kind": "codebook",
        "name": "tiny",
        "fps": 10,
        "videos": {
            "one": {"path": "one.mkv", "held_out": [{"start": 4, "end": 6}]},
            "two": {"path": "two.mkv"},
        },
        "shape": dict(SHAPE),
        "training": dict(TRAINING),
        "device": "cpu",
    }


@pytest.fixture
def save(tmp_path: Path) -> Any:
    """Writes a job's mapping beside its clips, and returns the file."""

    def write(job: dict[str, Any]) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    return write
