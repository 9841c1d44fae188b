"""Frames as tensors: resize and crop, patches and back, PSNR. No file or codec is touched here.

Legend: F frames, H and W pixels, N side of a square frame, P side of a patch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Frames = Tensor | NDArray[np.uint8]
"""uint8 RGB frames, [F, H, W, 3], as a tensor or a NumPy array."""


def resize_and_crop(frames: Frames, size: int, batch_frames: int = 64) -> Tensor:
    """Scale the short side to ``size`` (antialiased bilinear) and crop the centre square.

    Args:
        frames: uint8 [F, H, W, 3].
        size: pixels of a side of the result.
        batch_frames: frames resized at one time, which bounds the memory taken.

    Returns:
        uint8 [F, size, size, 3], contiguous.

    Raises:
        ValueError: not uint8 RGB frames.
    """
    source = as_frames(frames)
    height, width = source.shape[1:3]
    scale = size / min(height, width)
    resized = (max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    result = torch.empty(len(source), size, size, 3, dtype=torch.uint8)
    for start in range(0, len(source), batch_frames):
        channels_first = source[start : start + batch_frames].permute(0, 3, 1, 2)
        # Straight on uint8: torch's CPU kernel for it is over 20 times faster than through float.
        scaled = F.interpolate(channels_first, size=resized, mode="bilinear", antialias=True)
        square = scaled[:, :, top : top + size, left : left + size]
        result[start : start + batch_frames] = square.permute(0, 2, 3, 1)
    return result


def patchify(frames: Frames, patch_size: int) -> Tensor:
    """Cut square frames into patches, row by row.

    Args:
        frames: uint8 [F, N, N, 3].
        patch_size: P, divides N.

    Returns:
        uint8 [F, (N / P)^2, P * P * 3].

    Raises:
        ValueError: P does not divide the frame.
    """
    source = as_frames(frames)
    count, height, width, _ = source.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"frames of {height}x{width} pixels do not divide into patches of {patch_size}; "
            "resize_and_crop them to a multiple of it"
        )
    rows, columns = height // patch_size, width // patch_size
    tiled = source.reshape(count, rows, patch_size, columns, patch_size, 3)
    return tiled.permute(0, 1, 3, 2, 4, 5).reshape(count, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Square frames from their patches: the inverse of ``patchify``.

    Args:
        patches: [F, n^2, P * P * 3].
        patch_size: P.

    Returns:
        [F, n * P, n * P, 3], same dtype.

    Raises:
        ValueError: the number of patches is no square.
    """
    count, number, _ = patches.shape
    side = math.isqrt(number)
    if side * side != number:
        raise ValueError(f"{number} patches a frame do not form a square frame")
    tiled = patches.reshape(count, side, side, patch_size, patch_size, 3)
    return tiled.permute(0, 1, 3, 2, 4, 5).reshape(count, side * patch_size, side * patch_size, 3)


def psnr(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels; infinite where they are equal.

    Args:
        frames: uint8 [F, H, W, 3].
        reference: the same shape.

    Raises:
        ValueError: shapes differ.
    """
    one, other = as_frames(frames), as_frames(reference)
    if one.shape != other.shape:
        raise ValueError(f"psnr of frames {tuple(one.shape)} and {tuple(other.shape)}")
    error = (one.double() - other.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def as_frames(frames: Frames) -> Tensor:
    """The frames as a tensor, sharing memory where they were an array.

    Raises:
        ValueError: not uint8 [F, H, W, 3].
    """
    tensor = torch.as_tensor(frames)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[-1] != 3:
        raise ValueError(
            f"frames are {tensor.dtype} {tuple(tensor.shape)}; expected uint8 RGB [F, H, W, 3]"
        )
    return tensor
