"""Which pictures of a film are taken: moments at a steady rate, a stretch, a limit on their number.

Nothing here knows of files or codecs: a film is pictures with times, in order.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringworld_jobs.recipe import CropSpec
from ringworld_model.vision.frames import resize_and_crop
from ringworld_workers.data.files import DataError

EPSILON = 1e-6
"""Seconds; forgives the rounding of timestamps and of k / fps."""
MAX_PIXELS = 1 << 26
"""Pixels of a picture at most, 8192 x 8192: a small file may claim any size, and be believed."""
MIN_SIDE = 4
"""Pixels of a picture's shorter side at least: below, it is a dot on a web page."""
MAX_SECONDS = 172_800.0
"""Two days: a broken timestamp further off would be filled up with repeated frames."""
END_SLACK_SECONDS = 1.0
"""How far a stretch may reach beyond a film's end: captions are rounded to seconds."""
_MOST_MOMENTS = 1 << 62
_MAX_RATIO = 8
"""Of a picture's sides: what lies further out is cut before scaling, which would blow it up."""


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


class Reel:
    """Pictures in order of time, of which the one on screen at a moment can be asked for.

    The moments may only rise. Two pictures are in memory at a time.
    """

    def __init__(
        self,
        pictures: Iterator[Picture],
        skip: Callable[[float, float], Iterator[Picture] | None] | None = None,
    ) -> None:
        """Start before the first picture.

        Args:
            pictures: in order of time.
            skip: given where the reel is and the moment wanted, pictures from a later place on that
                is not after that moment; None: there is no such place.
        """
        self._pictures, self._skip = pictures, skip
        self._shown: Picture | None = None
        self._next = next(pictures, None)

    def at(self, time: float) -> Picture | None:
        """The latest picture that has appeared by then; None: the last one appeared before."""
        place = self._next.time if self._next is not None else math.inf
        if self._skip is not None and place < time - EPSILON:
            ahead = self._skip(place, time)
            if ahead is not None:
                self._pictures, self._next = ahead, next(ahead, None)
        while self._next is not None and self._next.time <= time + EPSILON:
            self._shown, self._next = self._next, next(self._pictures, None)
        if self._shown is None or (self._next is None and time > self._shown.time + EPSILON):
            return None
        return self._shown


def moments(sampling: Sampling) -> Iterator[float]:
    """Seconds at which a film is sampled, ``max_frames`` apart: start + k / fps, without end."""
    for k in itertools.count():
        time = sampling.start + k / sampling.fps
        if sampling.end is not None and time >= sampling.end - EPSILON:
            return
        yield time


def spread_moments(sampling: Sampling, last: float) -> list[float]:
    """The moments of a film whose last picture appears at ``last``: ``max_frames`` of them at most.

    They are spread evenly, the first and last included, by linspace cut to whole numbers.
    """

    def passed(k: int) -> bool:
        time = sampling.start + k / sampling.fps
        over = sampling.end is not None and time >= sampling.end - EPSILON
        return over or time > last + EPSILON

    # Counted without listing them: a rate is what somebody asks for, such as 1e9 a second.
    count = bisect.bisect_left(range(_MOST_MOMENTS), True, key=passed)
    if sampling.max_frames is None or count <= sampling.max_frames:
        numbers = list(range(count))
    else:
        numbers = np.linspace(0, count - 1, sampling.max_frames).astype(int).tolist()
    return [sampling.start + k / sampling.fps for k in numbers]


def take(
    reel: Reel, times: Iterable[float], size: int, crop: CropSpec | None
) -> Iterator[SampledFrame]:
    """The frames on screen at some moments, until the reel ends.

    Args:
        reel: at or before the first moment.
        times: the moments, rising.
        size: pixels of a side of the result.
        crop: part of each picture that is used.

    Raises:
        DataError: a picture cannot be used.
    """
    before, pixels = None, np.zeros(0, np.uint8)
    for time in times:
        picture = reel.at(time)
        if picture is None:
            return
        # Where the film has fewer pictures than are taken, one is scaled once.
        if picture is not before:
            before, pixels = picture, square(picture.pixels(), size, crop)
        yield SampledFrame(time, picture.time, pixels)


def check_stretch(sampling: Sampling, last: float, ends: float) -> None:
    """Refuse a stretch that the film does not have.

    Args:
        sampling: the stretch.
        last: when the film's last picture appears.
        ends: when it ends.

    Raises:
        DataError: the stretch begins after the last picture, or ends well after the film.
    """
    if sampling.start > last + EPSILON:
        raise DataError(
            f"the stretch starts at {sampling.start:g} s, but the video ends at {ends:.3f} s"
        )
    if sampling.end is not None and sampling.end > ends + END_SLACK_SECONDS:
        raise DataError(
            f"the stretch ends at {sampling.end:g} s, but the video ends at {ends:.3f} s"
        )


def check_size(width: int, height: int) -> None:
    """Refuse pictures that are too large to decode, or too small to show anything.

    Raises:
        DataError: names the size and the limit.
    """
    if width * height > MAX_PIXELS:
        raise DataError(
            f"a picture of {width}x{height} pixels; the limit is {MAX_PIXELS:,} pixels, scale it"
        )
    if min(width, height) < MIN_SIDE:
        raise DataError(
            f"a picture of {width}x{height} pixels; each side needs at least {MIN_SIDE}"
        )


def square(
    pixels: npt.NDArray[np.uint8], size: int, crop: CropSpec | None
) -> npt.NDArray[np.uint8]:
    """Crop a picture, scale its short side to ``size`` and take the centre.

    Args:
        pixels: uint8 RGB [H, W, 3].
        size: pixels of a side of the result.
        crop: part of the picture that is used; None: all of it.

    Returns:
        uint8 RGB [size, size, 3].

    Raises:
        DataError: the picture is too small, or smaller than the crop.
    """
    if crop is not None:
        bottom, right = crop.top + crop.height, crop.left + crop.width
        if bottom > pixels.shape[0] or right > pixels.shape[1]:
            raise DataError(
                f"crop reaches to row {bottom} and column {right}, but a frame is "
                f"{pixels.shape[1]}x{pixels.shape[0]}; make the crop smaller"
            )
        pixels = pixels[crop.top : bottom, crop.left : right]
    height, width = pixels.shape[:2]
    check_size(width, height)
    most = _MAX_RATIO * min(height, width)
    top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
    pixels = pixels[top : height - top, left : width - left]
    whole = np.require(pixels, requirements=["C", "W"])
    return resize_and_crop(whole[None], size)[0].numpy()
