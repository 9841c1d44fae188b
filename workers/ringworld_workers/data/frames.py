"""Sampled frames of a recipe's videos, spooled to disk: hours of video, megabytes of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringworld_jobs.recipe import CodebookSpec, SpanSpec, VideoSpec
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.clips import Timeline
from ringworld_workers.data.sampling import Sampling
from ringworld_workers.data.video import sample_video

MAX_FITTED_FRAMES = 1024
"""Frames that the codebook's patches are sampled from, evenly spaced over all training frames."""
_BATCH_FRAMES = 256
_REPORT_FRAMES = 50


@dataclass(frozen=True, slots=True)
class FrameSpool:
    """The frames of one video at one rate.

    Attributes:
        path: raw uint8 [F, size, size, 3] on disk.
        size: pixels of a side.
        timeline: when they are on screen.
    """

    path: Path
    size: int
    timeline: Timeline

    def frames(self) -> npt.NDArray[np.uint8]:
        """[F, size, size, 3] uint8, memory-mapped."""
        shape = (len(self.timeline.shown), self.size, self.size, 3)
        return np.memmap(self.path, dtype=np.uint8, mode="r", shape=shape)

    def encode(self, codebook: PatchCodebook) -> npt.NDArray[np.int32]:
        """Codes of all frames, int32 [F, codes_per_frame]."""
        frames = self.frames()
        parts = [
            codebook.encode(np.array(frames[start : start + _BATCH_FRAMES]))
            for start in range(0, len(frames), _BATCH_FRAMES)
        ]
        return np.concatenate(parts)


def spool_video(
    source: Path,
    video: VideoSpec,
    *,
    fps: float,
    size: int,
    target: Path,
    on_frames: Callable[[int], None],
) -> FrameSpool:
    """Sample a video into a file of raw frames.

    Args:
        source: the video file.
        video: its crop.
        fps: frames a second.
        size: pixels of a side.
        target: file to write.
        on_frames: called with the frames written so far, now and then.

    Raises:
        DataError: the file cannot be decoded.
    """
    shown = []
    with target.open("wb") as file:
        for frame in sample_video(source, Sampling(fps, crop=video.crop), size):
            file.write(frame.pixels.tobytes())
            shown.append(frame.shown)
            if len(shown) % _REPORT_FRAMES == 0:
                on_frames(len(shown))
    return FrameSpool(target, size, Timeline(np.asarray(shown), fps))


def fit_codebook(
    spools: Sequence[tuple[FrameSpool, Sequence[SpanSpec]]], spec: CodebookSpec, seed: int
) -> PatchCodebook:
    """Fit the codebook on training frames alone.

    Args:
        spools: frames of each video, and its held-out stretches.
        spec: size of the codebook and of its frames.
        seed: of the sample.

    Raises:
        ValueError: fewer patches than codes.
    """
    training = [
        (spool, int(index))
        for spool, spans in spools
        for index in np.flatnonzero(spool.timeline.held_out(spans) == -1)
    ]
    number = min(MAX_FITTED_FRAMES, len(training))
    chosen = [training[i * len(training) // number] for i in range(number)]
    frames = np.zeros((number, spec.frame_size, spec.frame_size, 3), dtype=np.uint8)
    for row, (spool, index) in enumerate(chosen):
        frames[row] = spool.frames()[index]
    return PatchCodebook.fit(
        frames, spec.codebook_size, spec.patch_size, iterations=spec.iterations, seed=seed
    )
