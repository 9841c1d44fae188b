"""Video files to small square frames, at a steady rate, one frame in memory at a time."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import av
import av.container
import av.stream
import numpy as np
import numpy.typing as npt

from ringworld_workers.data.files import DataError
from ringworld_workers.data.sampling import (
    EPSILON,
    MAX_PIXELS,
    MAX_SECONDS,
    Picture,
    Reel,
    SampledFrame,
    Sampling,
    check_size,
    check_stretch,
    moments,
    spread_moments,
    take,
)

_FORMATS = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,ogg,asf,flv,gif,ivf,mxf,nut,dv,rm,yuv4mpegpipe,"
    "h264,hevc,m4v,av1,obu"
)
"""Demuxers that may be used. Others read playlists and scripts, which name further files and URLs,
or make pictures of any text."""
_INDEXED = ("mov", "matroska")
"""Containers that know their key frames: a seek lands on one, and decoding from it is exact."""
_EARLY_SECONDS = 1.0
"""Seeks aim so much before: an index may go by the order of decoding, which runs ahead."""
_LEAP_SECONDS = 3.0
"""Less than this is decoded through; a seek would hardly save any."""
_DECLARING = ("mov", "matroska", "avi")
"""Containers whose header says how long the video stream is."""
_BREAK_SECONDS = 0.5
"""A video that ends this much before its header says has lost its end."""
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_BACKWARD_SECONDS = 1.0
"""Timestamps may go back by less than this, as muxers' rounding makes them."""


def sample_video(
    path: Path, sampling: Sampling, size: int, on_picture: Callable[[], None] = lambda: None
) -> Iterator[SampledFrame]:
    """Decode a video and yield what is on screen at start, start + 1/fps, start + 2/fps, ... s.

    Sampling goes by timestamps, so a variable frame rate and a rate below ``fps`` (frames are then
    repeated) come out right; the last moment is not after the last picture appeared. Where a
    container knows its key frames, what is not needed is passed over.

    Args:
        path: any container and codec that FFmpeg reads.
        sampling: rate, stretch, frames at most, crop.
        size: pixels of a side of the result.
        on_picture: see ``sample_media``.

    Raises:
        DataError: the file holds no video, breaks off, is damaged, lacks the stretch, or is smaller
            than the crop; names no path.
    """
    times: Iterable[float] = moments(sampling)
    if sampling.max_frames is not None:
        last, ends = _last_picture(path, on_picture)
        check_stretch(sampling, last, ends)
        times = spread_moments(sampling, last)
    with _Film.open(path, on_picture) as film:
        yield from take(film.reel(), times, size, sampling.crop)
        if film.complete:
            check_stretch(sampling, film.latest, film.ends)


def _last_picture(path: Path, on_picture: Callable[[], None]) -> tuple[float, float]:
    """When the last picture appears, and when it ends."""
    with _Film.open(path, on_picture) as film:
        if film.decode_last():
            return film.latest, film.ends
    with _Film.open(path, on_picture) as film:
        for _ in film.decode():
            pass
        return film.latest, film.ends


class _Film:
    """An open video file.

    Attributes:
        complete: the last picture has been decoded.
        latest: when the latest decoded picture appears; -1: none has been.
        ends: when it is over, of the last picture if ``complete``.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        stream: av.VideoStream,
        on_picture: Callable[[], None],
    ) -> None:
        self._container, self._stream, self._on_picture = container, stream, on_picture
        self._indexed = container.format.name.split(",")[0] in _INDEXED
        self._leap = _LEAP_SECONDS
        self._first: float | None = None
        self.complete, self.latest, self.ends = False, -1.0, 0.0

    @staticmethod
    @contextmanager
    def open(path: Path, on_picture: Callable[[], None]) -> Iterator[_Film]:
        """Open a file, and turn what the decoder says into DataError."""
        film = None
        try:
            with _container(path) as container:
                stream = _video_stream(container)
                stream.thread_type = "AUTO"
                # Checked by the decoder itself, for each frame may claim another size.
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                context = stream.codec_context
                if context.width and context.height:
                    check_size(context.width, context.height)
                _check_whole(path, stream)
                film = _Film(container, stream, on_picture)
                yield film
        except av.FFmpegError as error:
            started = film is not None and film.latest >= 0
            where = f"after {film.latest:.3f} s" if film and started else "at its start"
            if isinstance(error, av.EOFError) and not started:
                raise DataError("the video stream holds no frame") from error
            why = error.strerror
            if film is None and isinstance(error, av.ArgumentError):
                why = "it holds no image or video of a format that is read"
            raise DataError(f"cannot be decoded {where}: {why}") from error

    def reel(self) -> Reel:
        """The pictures from the first on; to be asked for once."""
        return Reel(self.decode(), self._skip if self._indexed else None)

    def decode_last(self) -> bool:
        """Decode from a key frame near the end; False: that cannot be done here."""
        seconds = _declared_seconds(self._container, self._stream, 0.0)
        if not self._indexed or seconds is None:
            return False
        next(self.decode(), None)  # the first picture, which is second 0
        try:
            for _ in self.decode(max(0.0, seconds - _EARLY_SECONDS)):
                pass
        except DataError:
            # Decoding all of it will say what is wrong.
            return False
        return self.complete

    def _skip(self, place: float, time: float) -> Iterator[Picture] | None:
        """Pictures from the key frame before ``time`` on, where that may save decoding."""
        gap = time - place
        if gap <= self._leap:
            return None
        pictures = self.decode(time - _EARLY_SECONDS)
        found = next(pictures, None)
        if found is None or found.time > time + EPSILON:
            # The index is wrong. Nothing is passed over from here on.
            self._leap = math.inf
            return self.decode(0.0)
        if found.time <= place:
            # Key frames are further apart than that: it was decoded again for nothing.
            self._leap = 2 * gap
        return itertools.chain([found], pictures)

    def decode(self, place: float | None = None) -> Iterator[Picture]:
        """Pictures in order.

        Args:
            place: seconds; start from a key frame that is not after it. None: from where the file
                stands, which is its start.

        Raises:
            DataError: a picture is damaged or has no place in time, or the end is missing.
        """
        if place is not None:
            seconds = place + (self._first or 0.0) + EPSILON
            offset = math.floor(seconds / float(self._stream.time_base or 1))
            self._container.seek(offset, stream=self._stream)
        self.latest, self.complete = -1.0, False
        for frame in self._container.decode(self._stream):
            self._on_picture()
            if frame.time is None:
                raise DataError("a frame has no timestamp")
            if frame.is_corrupt:
                raise DataError(f"the frame at {frame.time:.3f} s is damaged")
            if self._first is None:
                self._first = frame.time
            time = frame.time - self._first
            if abs(time) > MAX_SECONDS:
                raise DataError(
                    f"a frame has its timestamp at {time:,.0f} s; the limit is {MAX_SECONDS:,.0f} s"
                )
            if time < self.latest - _BACKWARD_SECONDS:
                raise DataError(
                    f"timestamps go back from {self.latest:.3f} s to {time:.3f} s; remux the file"
                )
            self.latest = max(self.latest, time)
            duration = float((frame.duration or 0) * (frame.time_base or 0))
            self.ends = self.latest + (duration or 1 / float(self._stream.average_rate or 1))
            yield Picture(self.latest, partial(_pixels, frame))
        if self.latest < 0:
            raise DataError("the video stream holds no frame")
        declared = _declared_seconds(self._container, self._stream, self._first or 0.0)
        if declared is not None and self.ends < declared - _BREAK_SECONDS:
            raise DataError(f"breaks off at {self.ends:.3f} s of {declared:.3f} s; copy it again")
        self.complete = True


@contextmanager
def _container(path: Path) -> Iterator[av.container.InputContainer]:
    # A file, whatever its name looks like, and nothing that it might refer to.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    with av.open(f"file:{path}", options=options) as container:
        yield container


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    for stream in container.streams.video:
        # A song's cover is a video stream of one picture.
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise DataError("the file holds no video stream")


def _check_whole(path: Path, stream: av.VideoStream) -> None:
    """Refuse a file that ends before the last frame that its index names."""
    entries = stream.index_entries
    if len(entries):
        end, size = entries[-1].pos + entries[-1].size, path.stat().st_size
        if end > size:
            raise DataError(
                f"breaks off at byte {size:,}, before its last frame at {end:,}; copy it again"
            )


def _declared_seconds(
    container: av.container.InputContainer, stream: av.VideoStream, first: float
) -> float | None:
    """When the video ends after its first picture, by the file's header; None: it does not say."""
    name = container.format.name.split(",")[0]
    if name not in _DECLARING:
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    match = _CLOCK.match(stream.metadata.get("DURATION", ""))
    if match:
        hours, minutes, seconds = (float(group) for group in match.groups())
        return 3600 * hours + 60 * minutes + seconds - first
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base - first
    return None


def _pixels(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    check_size(frame.width, frame.height)
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    # Phones write pictures as the sensor lay, and say by how much to turn them, anticlockwise.
    return np.rot90(pixels, round(frame.rotation / 90))
