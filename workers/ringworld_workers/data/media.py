"""Frames of any image or video file, told by its content: the one way from a file to pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ringworld_workers.data.sampling import SampledFrame, Sampling
from ringworld_workers.data.video import sample_frames


def sample_media(path: Path, sampling: Sampling, size: int) -> Iterator[SampledFrame]:
    """Frames of an image or video, in order of time, one in memory at a time.

    Args:
        path: the file.
        sampling: which frames.
        size: pixels of a side of the result.

    Raises:
        DataError: the file cannot be used; says why, and names no path.
    """
    return sample_frames(path, fps=sampling.fps, size=size, crop=sampling.crop)
