"""Pictures and clips to files: png, mp4, gif. A file is there when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from ringworld_workers.generation.source import RequestError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".gif")
_QUALITY = "18"
"""x264's constant rate factor: hardly to be told from the original."""


def check_suffix(path: Path, *, video: bool) -> None:
    """Refuse a file name that says nothing of its format.

    Raises:
        RequestError: names the suffixes that are written.
    """
    known = VIDEO_SUFFIXES if video else IMAGE_SUFFIXES
    if path.suffix.lower() not in known:
        kind = "a video" if video else "an image"
        raise RequestError(f"{path}: {kind} is written as {', '.join(known)}; end its name so")


def write_image(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    """Write one picture.

    Args:
        pixels: uint8 [H, W, 3].
        path: with a suffix of ``IMAGE_SUFFIXES``.

    Raises:
        RequestError: it cannot be written.
    """
    with _whole(path) as temporary:
        Image.fromarray(pixels).save(temporary)


def write_video(frames: npt.NDArray[np.uint8], path: Path, fps: float) -> None:
    """Write a clip.

    Args:
        frames: uint8 [F, H, W, 3], H and W even.
        path: with a suffix of ``VIDEO_SUFFIXES``.
        fps: frames shown a second.

    Raises:
        RequestError: it cannot be written.
    """
    with _whole(path) as temporary:
        if path.suffix.lower() == ".gif":
            first, *rest = [Image.fromarray(frame) for frame in frames]
            milliseconds = max(20, round(1000 / fps))
            first.save(temporary, save_all=True, append_images=rest, duration=milliseconds, loop=0)
            return
        _write_mp4(frames, temporary, fps)


def _write_mp4(frames: npt.NDArray[np.uint8], path: Path, fps: float) -> None:
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": _QUALITY})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside the file, which it has until it is complete."""
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
