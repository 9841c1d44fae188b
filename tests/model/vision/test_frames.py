"""Frames: resize, crop, patches, PSNR."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ringworld_model.vision.frames import patchify, psnr, resize_and_crop, unpatchify


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (64, 64), (9, 300)])
def test_the_centre_square_is_kept(shape: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, *shape, 3), dtype=np.uint8)
    square = resize_and_crop(frames, 16, batch_frames=2)
    assert square.shape == (5, 16, 16, 3)
    assert square.dtype == torch.uint8
    assert square.is_contiguous()


def test_resize_keeps_colours_and_orientation() -> None:
    frames = np.zeros((1, 40, 80, 3), np.uint8)
    frames[:, :20, :, 0] = 200  # red above
    frames[:, 20:, :, 2] = 100  # blue below
    frames[:, :, :20, 1] = frames[:, :, 60:, 1] = 250  # green sides, cropped away
    square = resize_and_crop(frames, 10)
    assert square[0, 0, 5].tolist() == [200, 0, 0]
    assert square[0, 9, 5].tolist() == [0, 0, 100]
    assert square[..., 1].max() < 60


def test_a_frame_of_the_right_size_is_untouched() -> None:
    frames = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(resize_and_crop(frames, 16), frames)


def test_patches_are_cut_row_by_row_and_joined_again() -> None:
    frames = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    patches = patchify(frames, 4)
    assert patches.shape == (3, 9, 48)
    assert torch.equal(patches[1, 5], frames[1, 4:8, 8:12].flatten())
    assert torch.equal(unpatchify(patches, 4), frames)


def test_what_does_not_fit_is_refused() -> None:
    frames = torch.zeros(1, 12, 12, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="12x12 pixels do not divide into patches of 5"):
        patchify(frames, 5)
    with pytest.raises(ValueError, match="7 patches a frame do not form a square"):
        unpatchify(torch.zeros(1, 7, 48), 4)
    with pytest.raises(ValueError, match="expected uint8 RGB"):
        resize_and_crop(frames.float(), 8)
    with pytest.raises(ValueError, match="expected uint8 RGB"):
        patchify(frames[0], 4)


def test_psnr() -> None:
    frames = torch.full((1, 4, 4, 3), 100, dtype=torch.uint8)
    assert psnr(frames, frames) == math.inf
    assert psnr(frames, frames + 10) == pytest.approx(10 * math.log10(255**2 / 100))
    with pytest.raises(ValueError, match="psnr of frames"):
        psnr(frames, frames[:, :2])
