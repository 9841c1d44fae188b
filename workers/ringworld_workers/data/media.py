"""Frames of any image or video file, told by its content: the one way from a file to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ringworld_workers.data.files import DataError
from ringworld_workers.data.images import is_image, sample_image
from ringworld_workers.data.sampling import SampledFrame, Sampling
from ringworld_workers.data.video import sample_video


def sample_media(
    path: Path, sampling: Sampling, size: int, on_picture: Callable[[], None] = lambda: None
) -> Iterator[SampledFrame]:
    """Frames of an image or video, in order of time, one in memory at a time.

    Args:
        path: the file.
        sampling: which frames.
        size: pixels of a side of the result.
        on_picture: called for each picture that is decoded, also where no frame is taken of it; may
            raise what ends the decoding.

    Raises:
        DataError: the file cannot be used; says why, and names no path.
    """
    try:
        if path.stat().st_size == 0:
            raise DataError("the file is empty")
        image = is_image(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    count = 0
    for frame in (sample_image if image else sample_video)(path, sampling, size, on_picture):
        count += 1
        yield frame
    if count == 0:
        raise DataError("no frame lies in the stretch")
