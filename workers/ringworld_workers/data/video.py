"""Video files to small square frames, at a steady rate, one frame in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from ringworld_jobs.recipe import CropSpec
from ringworld_model.vision.frames import resize_and_crop
from ringworld_workers.data.files import DataError
from ringworld_workers.data.sampling import SampledFrame

_EPSILON = 1e-6
"""Seconds; forgives the rounding of timestamps and of k / fps."""


def sample_frames(
    path: Path, *, fps: float, size: int, crop: CropSpec | None = None
) -> Iterator[SampledFrame]:
    """Decode a video and yield what is on screen at 0, 1/fps, 2/fps, ... seconds.

    Sampling goes by timestamps, so a variable frame rate and a rate below ``fps`` (frames are then
    repeated) come out right. The picture is cropped, scaled, and its centre square taken. Some
    containers (Matroska) end quietly where they are damaged; the frames until there are taken.

    Args:
        path: any container and codec that FFmpeg reads.
        fps: frames a second of video.
        size: pixels of a side.
        crop: part of the picture that is used; empty: all of it.

    Raises:
        DataError: the file holds no video, breaks off, or is smaller than the crop.
    """
    previous: av.VideoFrame | None = None
    first = shown = 0.0
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: the file holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.time is None:
                    raise DataError(f"{path}: a frame has no timestamp")
                if frame.is_corrupt:
                    raise DataError(f"{path}: the frame at {frame.time:.3f} s is damaged")
                if previous is None:
                    first = frame.time
                # The frame before this one stays on screen until this one's time.
                while previous is not None and count / fps < frame.time - first - _EPSILON:
                    yield SampledFrame(count / fps, shown, _square(previous, size, crop, path))
                    count += 1
                previous, shown = frame, frame.time - first
            while previous is not None and count / fps <= shown + _EPSILON:
                yield SampledFrame(count / fps, shown, _square(previous, size, crop, path))
                count += 1
    except av.FFmpegError as error:
        where = f"after {shown:.3f} s" if previous is not None else "at its start"
        raise DataError(f"{path}: cannot be decoded {where}: {error.strerror}") from error
    if previous is None:
        raise DataError(f"{path}: the video stream holds no frame")


def _square(
    frame: av.VideoFrame, size: int, crop: CropSpec | None, path: Path
) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    if crop is not None:
        bottom, right = crop.top + crop.height, crop.left + crop.width
        if bottom > pixels.shape[0] or right > pixels.shape[1]:
            raise DataError(
                f"{path}: crop reaches to row {bottom} and column {right}, but a frame is "
                f"{pixels.shape[1]}x{pixels.shape[0]}; make the crop smaller"
            )
        pixels = pixels[crop.top : bottom, crop.left : right]
    return resize_and_crop(np.ascontiguousarray(pixels)[None], size)[0].numpy()
