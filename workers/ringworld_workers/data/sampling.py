"""Which pictures of a film are taken: moments at a steady rate, a stretch, a limit on their number.

Nothing here knows of files or codecs: films are pictures with times, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringworld_jobs.recipe import CropSpec

EPSILON = 1e-6
"""Seconds; forgives the rounding of timestamps and of k / fps."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of an image or video are taken.

    Attributes:
        fps: frames a second of video; an image is one frame.
        max_frames: frames at most, spread evenly from the first to the last; None: all.
        start: first second of the stretch that is taken.
        end: second at which the stretch ends, exclusive; None: the file's end.
        crop: part of the picture that is used; None: all of it.
    """

    fps: float
    max_frames: int | None = None
    start: float = 0.0
    end: float | None = None
    crop: CropSpec | None = None


@dataclass(frozen=True, slots=True)
class SampledFrame:
    """What a player would show at one moment.

    Attributes:
        time: the moment, in seconds from the file's first picture.
        shown: when the picture shown then appeared, at most ``time``.
        pixels: [size, size, 3] uint8 RGB.
    """

    time: float
    shown: float
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a film, not yet converted.

    Attributes:
        time: seconds from the film's first picture at which it appears.
        pixels: converts it to uint8 RGB [H, W, 3].
    """

    time: float
    pixels: Callable[[], npt.NDArray[np.uint8]]


def moments(sampling: Sampling, last: float) -> npt.NDArray[np.float64]:
    """Seconds at which a film is sampled, before ``max_frames``: start + k / fps.

    Args:
        sampling: rate and stretch.
        last: when the film's last picture appears.

    Returns:
        float64 [n]; empty where the stretch begins after the last picture.
    """
    until = last + EPSILON
    if sampling.end is not None:
        until = min(until, sampling.end - EPSILON)
    if until < sampling.start:
        return np.zeros(0)
    count = math.floor((until - sampling.start) * sampling.fps) + 2
    times = sampling.start + np.arange(count) / sampling.fps
    return times[times <= until]


def spread(count: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Which of ``count`` frames are kept: all, or ``limit`` evenly, the first and last included."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).astype(np.int64)


def on_screen(
    pictures: Iterator[Picture], times: npt.NDArray[np.float64] | None, fps: float
) -> Iterator[tuple[float, Picture]]:
    """What is on screen at each moment: the latest picture that has appeared by then.

    Args:
        pictures: in order of time.
        times: the moments, rising; None: k / fps until the last picture appears.
        fps: of the moments, where they are not given.

    Yields:
        The moment, and the picture shown then.
    """
    count = 0

    def moment() -> float:
        if times is None:
            return count / fps
        return float(times[count]) if count < len(times) else math.inf

    shown: Picture | None = None
    for picture in pictures:
        # The picture before this one stays on screen until this one's time.
        while shown is not None and moment() < picture.time - EPSILON:
            yield moment(), shown
            count += 1
        shown = picture
        if moment() == math.inf:
            return
    while shown is not None and moment() <= shown.time + EPSILON:
        yield moment(), shown
        count += 1
