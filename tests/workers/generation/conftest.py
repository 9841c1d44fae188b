"""A tiny model in a folder, media to ask about, and a ring of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from asked_folder import write_folder
from PIL import Image

from ringworld_platform.model_places import find_model
from ringworld_workers.generation.coder import Coder, load_coder
from ringworld_workers.generation.local_ring import LocalRing
from ringworld_workers.generation.media_files import write_video
from ringworld_workers.generation.source import ModelSource


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = write_folder(tmp_path_factory.mktemp("model") / "tiny")
    return find_model(str(folder), Path("no-runs"))


@pytest.fixture(scope="session")
def coder(source: ModelSource) -> Coder:
    return load_coder(source)


@pytest.fixture(scope="session")
def ring(source: ModelSource) -> Iterator[LocalRing]:
    with LocalRing(source, device="cpu") as made:
        yield made


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than high: red at the left, blue at the right."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24, 0] = pixels[:, 24:, 2] = 255
    path = tmp_path_factory.mktemp("media") / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds at 10 pictures a second, from black to white."""
    levels = np.linspace(0, 255, 20).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (20, 32, 32, 3)).copy()
    path = tmp_path_factory.mktemp("media") / "film.mp4"
    write_video(frames, path, 10)
    return path
