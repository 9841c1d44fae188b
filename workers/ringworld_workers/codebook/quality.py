"""How good a codebook is on clips that it never saw, and how good plain patches would be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ringworld_jobs.codebook import CodebookJob
from ringworld_model.vision.frame_tokenizer import FrameTokenizer
from ringworld_model.vision.frames import psnr
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_model.vision.vqgan import VQGAN, from_pixels, to_pixels
from ringworld_workers.codebook.clips import Clips

MAX_FRAMES = 256
"""Held-out frames that an evaluation in the midst of training looks at, evenly spaced."""

MAX_FITTED_FRAMES = 1024
"""Training frames that the patch codebook is fitted on, evenly spaced."""

_BATCH_FRAMES = 64
_KMEANS_LIMIT = 2**36
"""Multiplications of one round of k-means above which patches are not compared with."""
_KMEANS_SAMPLES = 40_000


@dataclass(frozen=True, slots=True)
class Quality:
    """What is left of frames that went through codes and back.

    Attributes:
        psnr_db: over all pixels of all held-out clips.
        codes_used: different codes that these frames have.
        clips: PSNR of each clip by its name.
    """

    psnr_db: float
    codes_used: int
    clips: dict[str, float]


def evenly(count: int, most: int) -> npt.NDArray[np.int64]:
    """Indices of at most ``most`` of ``count`` things, evenly spaced, first and last included."""
    if count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64)


@torch.no_grad()
def continuous_psnr(model: VQGAN, frames: npt.NDArray[np.uint8], device: str) -> float:
    """PSNR in dB of frames through encoder and decoder alone, uint8 [F, N, N, 3]: no codes yet."""
    parts = []
    for start in range(0, len(frames), _BATCH_FRAMES):
        batch = torch.from_numpy(frames[start : start + _BATCH_FRAMES])
        made = model.reconstruct(model.latents(from_pixels(batch, device)))
        parts.append(to_pixels(made).cpu())
    return psnr(torch.cat(parts), frames)


def measure(tokenizer: FrameTokenizer, clips: Clips) -> Quality:
    """Encode and decode every held-out frame, in bounded memory."""
    frames = clips.frames("held_out")
    used = np.zeros(tokenizer.codebook_size, dtype=bool)
    errors: list[float] = []
    qualities: dict[str, float] = {}
    start = 0
    for clip in clips.held_out:
        squares = 0.0
        for first in range(start, start + clip.frames, _BATCH_FRAMES):
            batch = np.array(frames[first : min(first + _BATCH_FRAMES, start + clip.frames)])
            codes = tokenizer.encode(batch)
            used[np.unique(codes)] = True
            difference = tokenizer.decode(codes).astype(np.float64) - batch
            squares += float((difference**2).sum())
        errors.append(squares)
        qualities[clip.name] = _psnr(squares, clip.frames * frames[0].size)
        start += clip.frames
    return Quality(_psnr(sum(errors), frames.size), int(used.sum()), qualities)


def _psnr(squares: float, values: int) -> float:
    return float("inf") if squares == 0 else float(10 * np.log10(255**2 * values / squares))


def fit_patches(job: CodebookJob, clips: Clips) -> PatchCodebook | None:
    """A patch codebook of as many codes and as many codes a frame, on the same training frames.

    None where k-means would take long, or there are fewer patches than codes.
    """
    shape = job.shape
    patch_values = 3 * shape.downsampling**2
    if _KMEANS_SAMPLES * shape.codebook_size * patch_values > _KMEANS_LIMIT:
        return None
    frames = clips.frames("train")
    chosen = np.array(frames[evenly(len(frames), MAX_FITTED_FRAMES)])
    if len(chosen) * shape.codes_per_frame < shape.codebook_size:
        return None
    return PatchCodebook.fit(chosen, shape.codebook_size, shape.downsampling, seed=job.seed)
