"""Small synthetic inputs: a video whose frames tell their time, and texts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml

from ringworld_workers.data.prepare import Prepared, build
from ringworld_workers.data.shards import FORMAT_VERSION, SPLITS, ShardWriter, Split

WORDS = "ring world token frame clip drum lamp guitar nation union state law people year".split()

VideoWriter = Callable[..., Path]


@pytest.fixture(scope="session")
def write_video() -> VideoWriter:
    """Write a lossless video of flat frames: ``write(path, colours, times)``."""

    def write(
        path: Path,
        colours: Sequence[tuple[int, int, int]],
        times: Sequence[float] | None = None,
        width: int = 48,
        height: int = 32,
    ) -> Path:
        # bitexact: no random ids in the container.
        with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
            stream.codec_context.time_base = Fraction(1, 1000)
            for index, colour in enumerate(colours):
                pixels = np.empty((height, width, 3), np.uint8)
                pixels[:] = colour
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.time_base = Fraction(1, 1000)
                frame.pts = round(1000 * (times[index] if times else index / 10))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


def make_text(seed: int, words: int) -> str:
    """Random words; the same for the same seed."""
    generator = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in generator.integers(len(WORDS), size=words))


GREY = [(40 + k, 40 + k, 40 + k) for k in range(60)]
RED = (220, 10, 10)


@pytest.fixture(scope="session")
def make_recipe(write_video: VideoWriter) -> Callable[..., Path]:
    """Write a recipe and its inputs: 6 s of film, red (held out) from 3 to 4.5 s, and 6 texts."""

    def make(folder: Path, **changes: object) -> Path:
        folder.mkdir(exist_ok=True)
        colours = [RED if 30 <= k < 45 else GREY[k] for k in range(60)]
        if not (folder / "film.mkv").exists():
            write_video(folder / "film.mkv", colours)
        for number in range(6):
            (folder / f"text-{number}.txt").write_text(make_text(number, 150 + 40 * number))
        recipe = {
            "kind": "data",
            "name": "small",
            "tokenizer": {"train": {"vocabulary_size": 300}},
            "codebook": {"codebook_size": 16, "frame_size": 8, "patch_size": 4},
            "videos": {
                "film": {
                    "path": "film.mkv",
                    "credit": "A. Painter, CC0",
                    "captions": [
                        {"start": 0.0, "end": 3.0, "text": "a grey lamp"},
                        {"start": 3.0, "end": 4.5, "text": "a red drum"},
                        {"start": 4.5, "end": 6.0, "text": "a lighter lamp"},
                    ],
                    "held_out": [{"start": 3.0, "end": 4.5}],
                }
            },
            "datasets": {
                "texts": {
                    "kind": "text",
                    "files": ["text-*.txt"],
                    "held_out": ["text-3.txt"],
                    "credit": "Nobody",
                },
                "clips": {
                    "kind": "video_text",
                    "videos": ["film"],
                    "fps": 10,
                    "frames_per_clip": 4,
                    "stride_frames": 2,
                },
            },
        } | changes
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return make


@pytest.fixture(scope="session")
def small(make_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The unchanged recipe's data, built once; its texts lie in ``recipe`` beside the cache."""
    folder = tmp_path_factory.mktemp("small")
    return build(make_recipe(folder / "recipe"), folder / "cache")


DatasetWriter = Callable[..., Path]


@pytest.fixture(scope="session")
def write_dataset() -> DatasetWriter:
    """Write a prepared dataset of text without a build: ``write(folder, {split: lengths})``."""

    def write(folder: Path, splits: dict[Split, Sequence[int]], **changes: object) -> Path:
        folder.mkdir(parents=True)
        generator = np.random.default_rng(0)
        meta: dict[str, object] = {
            "format": FORMAT_VERSION,
            "name": folder.name,
            "kind": "text",
            "longer": "split",
            "pack_apart": False,
            "tokenizer": {"size": 300, "digest": "a tokenizer"},
            "codebook": None,
        }
        options = {key: changes.pop(key) for key in ("batch_tokens", "file_bytes") & changes.keys()}
        found: dict[str, object] = {}
        for split in SPLITS:
            lengths = splits.get(split, ())
            with ShardWriter(folder, split, **options) as writer:  # type: ignore[arg-type]
                for number, length in enumerate(lengths):
                    tokens = generator.integers(0, 300, length).astype(np.int32)
                    modality, loss = np.zeros(length, np.uint8), np.ones(length, np.uint8)
                    writer.add(tokens, modality, loss, f"{split} {number}")
            found[split] = {
                "examples": len(lengths),
                "tokens": sum(lengths),
                "text_tokens": sum(lengths),
                "vision_tokens": 0,
                "longest_example_tokens": max(lengths, default=0),
                "shards": writer.entries(),
            }
        (folder / "meta.json").write_text(json.dumps(meta | {"splits": found} | changes))
        return folder

    return write


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """These inputs are too small to share among threads, and other tests run beside them."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    torch.set_num_threads(1)
