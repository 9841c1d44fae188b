"""Sampled frames on disk, for as long as the codebook that encodes them is still to be fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ringworld_workers.data.sampling import SampledFrame
from ringworld_workers.data.work import written_whole


@dataclass(frozen=True, slots=True)
class FrameSpool:
    """Frames of one medium: raw pixels in one file, their times in another, written after it.

    Attributes:
        place: the files' common name, without suffix.
        size: pixels of a side of a frame.
    """

    place: Path
    size: int

    def write(self, frames: Iterator[SampledFrame]) -> None:
        """Write frames as they come; one is in memory at a time."""
        times = []
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._pixels) as path, path.open("wb") as file:
            for frame in frames:
                file.write(frame.pixels.tobytes())
                times.append((frame.time, frame.shown))
        with written_whole(self._times) as path, path.open("wb") as file:
            np.save(file, np.array(times).reshape(-1, 2), allow_pickle=False)

    def times(self) -> npt.NDArray[np.float64] | None:
        """[F, 2] float64: the moment of each frame, and when its picture appeared.

        None where there is no spool, or no more.
        """
        with suppress(FileNotFoundError):
            return np.load(self._times, allow_pickle=False)
        return None

    def pixels(self, rows: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Some of the frames, uint8 [len(rows), size, size, 3]."""
        shape = (self._pixels.stat().st_size // (3 * self.size**2), self.size, self.size, 3)
        return np.memmap(self._pixels, dtype=np.uint8, mode="r", shape=shape)[list(rows)]

    def frames(self) -> Iterator[SampledFrame] | None:
        """All frames in order, or None where there is no spool, or no more."""
        times = self.times()
        if times is None:
            return None
        try:
            file = self._pixels.open("rb")
        except FileNotFoundError:
            return None
        return _read(file, times, self.size)

    def remove(self) -> None:
        """Remove both files; the times first, without which the pixels do not count."""
        self._times.unlink(missing_ok=True)
        self._pixels.unlink(missing_ok=True)

    @property
    def _pixels(self) -> Path:
        return self.place.with_name(f"{self.place.name}.rgb")

    @property
    def _times(self) -> Path:
        return self.place.with_name(f"{self.place.name}.npy")


def _read(file: IO[bytes], times: npt.NDArray[np.float64], size: int) -> Iterator[SampledFrame]:
    with file:
        for time, shown in times:
            pixels = np.frombuffer(file.read(3 * size**2), np.uint8).reshape(size, size, 3)
            yield SampledFrame(float(time), float(shown), pixels)
