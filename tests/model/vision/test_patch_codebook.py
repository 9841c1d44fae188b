"""The k-means codebook: fit, encode, decode, digest, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ringworld_model.vision import codes as code_search
from ringworld_model.vision.frames import psnr, resize_and_crop
from ringworld_model.vision.patch_codebook import PatchCodebook


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)
    return resize_and_crop(coarse, 32)


@pytest.fixture(scope="module")
def codebook(frames: torch.Tensor) -> PatchCodebook:
    return PatchCodebook.fit(frames, 64, patch_size=4, iterations=8, seed=1)


def test_round_trip_is_close(codebook: PatchCodebook, frames: torch.Tensor) -> None:
    codes = codebook.encode(frames)
    assert (codes.shape, codes.dtype) == ((30, 64), np.int32)
    assert codebook.codes_per_frame == 64
    seen = codebook.decode(codes)
    assert (seen.shape, seen.dtype) == ((30, 32, 32, 3), np.uint8)
    coarse = PatchCodebook.fit(frames, 8, patch_size=4, iterations=8, seed=1)
    quality = psnr(seen, frames)
    assert quality > 20
    assert quality > psnr(coarse.decode(coarse.encode(frames)), frames) + 2


def test_encode_takes_the_nearest_code(
    codebook: PatchCodebook, frames: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_search, "TILE_VECTORS", 100)
    codes = codebook.encode(frames[:3])
    tiles = frames[:3].numpy().reshape(3, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = tiles.reshape(3, 64, 1, 48) / 255
    distances = ((patches - codebook.centroids) ** 2).sum(-1)
    chosen = np.take_along_axis(distances, codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), rtol=0, atol=1e-5)


def test_more_iterations_fit_better(frames: torch.Tensor) -> None:
    quality = []
    for iterations in (1, 10):
        fitted = PatchCodebook.fit(frames, 32, patch_size=4, iterations=iterations, seed=1)
        quality.append(psnr(fitted.decode(fitted.encode(frames)), frames))
    assert quality[1] > quality[0] + 0.1


def test_no_code_stays_unused(frames: torch.Tensor) -> None:
    # Most patches are one colour, so most first centroids coincide and all but one of them die.
    flat = torch.zeros(60, 32, 32, 3, dtype=torch.uint8)
    mixed = torch.cat([flat, frames[:6]])
    fitted = PatchCodebook.fit(mixed, 64, patch_size=4, iterations=12, seed=0)
    assert len(np.unique(fitted.encode(mixed))) >= 60


def test_the_seed_decides(codebook: PatchCodebook, frames: torch.Tensor) -> None:
    again = PatchCodebook.fit(frames.numpy(), 64, patch_size=4, iterations=8, seed=1)
    other = PatchCodebook.fit(frames, 64, patch_size=4, iterations=8, seed=2)
    assert again.digest() == codebook.digest()
    assert other.digest() != codebook.digest()
    assert PatchCodebook(codebook.centroids, 64, 4).digest() != codebook.digest()


def test_files(codebook: PatchCodebook, tmp_path: Path) -> None:
    codebook.save(tmp_path / "prepared")
    loaded = PatchCodebook.load(tmp_path / "prepared" / "codebook.npz")
    assert loaded.digest() == codebook.digest()
    assert (loaded.frame_size, loaded.patch_size) == (32, 4)
    np.savez(tmp_path / "other.npz", centroids=codebook.centroids)
    with pytest.raises(ValueError, match=r"other.npz is no patch codebook"):
        PatchCodebook.load(tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", centroids=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"pickled.npz is no patch codebook"):
        PatchCodebook.load(tmp_path / "pickled.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:-40])
    np.save(tmp_path / "array.npy", codebook.centroids)
    (tmp_path / "text").write_text("hello")
    for name in ("cut.npz", "array.npy", "text"):
        with pytest.raises(ValueError, match=f"{name} is no patch codebook") as caught:
            PatchCodebook.load(tmp_path / name)
        assert "pickle" not in str(caught.value)


def test_what_does_not_fit_is_refused(codebook: PatchCodebook, frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="frames are 16x16 pixels, the codebook's are 32x32"):
        codebook.encode(frames[:, :16, :16])
    with pytest.raises(ValueError, match="64 patches cannot fill codebook_size=65"):
        PatchCodebook.fit(frames[:1], 65, patch_size=4)
    with pytest.raises(ValueError, match="frames are 16x32 pixels"):
        PatchCodebook.fit(frames[:, :16], 8, patch_size=4)
    with pytest.raises(ValueError, match=r"need \[codes, 12\]"):
        PatchCodebook(codebook.centroids, 32, 2)
