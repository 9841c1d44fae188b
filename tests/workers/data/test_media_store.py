"""Codes kept by content, and the frames that a codebook is fitted on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ringworld_jobs.recipe import CropSpec, SpanSpec
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_model.vision.vqgan import VQGAN
from ringworld_model.vision.vqgan_config import VQGANConfig
from ringworld_model.vision.vqgan_tokenizer import VQGANTokenizer
from ringworld_workers.data.files import DataError, InputFile
from ringworld_workers.data.media import sample_media
from ringworld_workers.data.media_store import MediaStore, MediaUse, Sampling

VideoWriter = Callable[..., Path]
FPS = Sampling(10.0)


def greys(size: int = 8) -> PatchCodebook:
    """A code for each sixteenth of grey, four a frame."""
    levels = np.repeat(np.linspace(0, 1, 16, dtype=np.float32)[:, None], 48, axis=1)
    return PatchCodebook(levels, size, 4)


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    codebook = greys()
    codebook.save(tmp_path / "codebook.npz")
    return MediaStore(tmp_path / "media", 8, tmp_path / "codebook.npz", codebook.digest())


def film(tmp_path: Path, write_video: VideoWriter, name: str = "film.mkv") -> InputFile:
    colours = [(17 * (k % 16),) * 3 for k in range(32)]
    return InputFile(write_video(tmp_path / name, colours), name)


def kept(store: MediaStore) -> list[Path]:
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


def test_a_medium_is_decoded_and_encoded_once(
    tmp_path: Path, write_video: VideoWriter, store: MediaStore
) -> None:
    file = film(tmp_path, write_video)
    media = store.codes(file, FPS)
    assert media.codes.dtype == np.int32
    assert media.codes.tolist() == [[k % 16] * 4 for k in range(32)]
    assert media.times.tolist() == pytest.approx([k / 10 for k in range(32)])
    assert media.shown.tolist() == pytest.approx(media.times.tolist())
    (place,) = kept(store)
    # What is in the store is taken as it is: here the codes of another film.
    np.savez(place, codes=media.codes[:2], times=media.times[:2], shown=media.shown[:2])
    again = pickle.loads(pickle.dumps(store)).codes(file, FPS)
    assert len(again.codes) == 2
    # The same content elsewhere is the same medium; all else that codes depend on is another.
    copy = tmp_path / "copy.avi"
    copy.write_bytes(file.path.read_bytes())
    assert len(store.codes(InputFile(copy, "copy.avi"), FPS).codes) == 2
    crop = CropSpec(width=16, height=16)
    for other in (Sampling(5), Sampling(10, 3), Sampling(10, start=1), Sampling(10, crop=crop)):
        assert len(store.codes(file, other).codes) > 2
    other_digest = MediaStore(store.folder, 8, store.tokenizer_path, "another")
    assert len(other_digest.codes(file, FPS).codes) == 32
    assert len(kept(store)) == 6


def test_a_vqgan_gives_codes_through_the_same_seam(
    tmp_path: Path, write_video: VideoWriter
) -> None:
    config = VQGANConfig((4, 4), 1, latent_channels=4, codebook_size=8, norm_num_groups=2)
    torch.manual_seed(0)
    tokenizer = VQGANTokenizer(VQGAN(replace(config, frame_size=8)))
    tokenizer.save(tmp_path / "vqgan")
    file = film(tmp_path, write_video)
    store = MediaStore(tmp_path / "media", 8, tmp_path / "vqgan", tokenizer.digest(), "cpu")
    media = store.codes(file, Sampling(10, max_frames=3))
    frames = [frame.pixels for frame in sample_media(file.path, Sampling(10, max_frames=3), 8)]
    assert np.array_equal(media.codes, tokenizer.encode(np.stack(frames)))
    assert media.codes.shape == (3, store.geometry.codes_per_frame)


def test_a_bad_file_leaves_nothing(tmp_path: Path, store: MediaStore) -> None:
    path = tmp_path / "film.mp4"
    for content, says in ((b"words", "cannot be decoded at its start"), (b"", "file is empty")):
        path.write_bytes(content)
        for _ in range(2):
            with pytest.raises(DataError, match=says):
                store.codes(InputFile(path, "film.mp4"), FPS)
        with pytest.raises(DataError, match=says):
            store.spool(InputFile(path, "film.mp4"), FPS)
    for file, says in ((tmp_path / "none.png", "there is no such file"), (tmp_path, "is no file")):
        with pytest.raises(DataError, match=says):
            store.codes(InputFile(file, "x"), FPS)
    assert kept(store) == []


def test_without_a_codebook_there_are_frames_but_no_codes(
    tmp_path: Path, write_video: VideoWriter
) -> None:
    file = film(tmp_path, write_video)
    store = MediaStore(tmp_path / "media", 8)
    with pytest.raises(DataError, match="add `codebook:` to the recipe"):
        store.codes(file, FPS)
    store.spool(file, FPS)
    files = kept(store)
    assert len(files) == 2
    # Frames that wait on disk are encoded from there, and are then gone.
    greys().save(tmp_path / "codebook.npz")
    store = MediaStore(store.folder, 8, tmp_path / "codebook.npz", greys().digest())
    frames = next(path for path in files if path.suffix == ".rgb")
    frames.write_bytes(bytes([255]) * frames.stat().st_size)
    assert set(store.codes(file, FPS).codes.flat) == {15}
    assert [path.suffix for path in kept(store)] == [".npz"]
    assert store.geometry.codebook_size == 16
    assert store.geometry.codes_per_frame == 4


def test_a_codebook_is_fitted_on_training_frames_alone(
    tmp_path: Path, write_video: VideoWriter
) -> None:
    store = MediaStore(tmp_path / "media", 8)
    file, other = film(tmp_path, write_video), film(tmp_path, write_video, "copy.mkv")
    image = InputFile(tmp_path / "photo.png", "photo.png")
    Image.new("RGB", (8, 8), (1, 1, 1)).save(image.path)
    bad = InputFile(tmp_path / "bad.mp4", "bad.mp4")
    bad.path.write_text("no film")
    missing = InputFile(tmp_path / "none.mp4", "none.mp4")
    uses = [
        MediaUse(file, FPS, "film", spans=(SpanSpec(start=1.0, end=2.0),)),
        MediaUse(bad, FPS, "bad"),
        MediaUse(missing, FPS, "missing"),
        MediaUse(image, FPS, "photo"),
        MediaUse(file, FPS, "film"),  # another dataset's
    ]
    frames = store.fit_frames(uses)
    whole = [frame.pixels for frame in sample_media(file.path, FPS, 8)]
    photo = np.full((8, 8, 3), 1, np.uint8)
    expected = np.stack([*whole[:10], *whole[20:], photo])
    assert np.array_equal(frames, expected)
    # Of more than are wanted, every so many.
    few = store.fit_frames(uses, limit=5)
    assert np.array_equal(few, expected[[i * 23 // 5 for i in range(5)]])
    # Held out under any name, it is held out.
    uses.append(MediaUse(other, Sampling(2), "copy", held_out=True))
    assert np.array_equal(store.fit_frames(uses), photo[None])
    assert store.fit_frames([]).shape == (0, 8, 8, 3)
