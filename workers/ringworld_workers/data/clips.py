"""Clips of a sampled video: where they start, what their caption is, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringworld_jobs.recipe import CaptionSpec, SpanSpec

_EPSILON = 1e-6
"""Seconds; forgives the rounding of k / fps."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the sampled frames of a video are on screen.

    Attributes:
        shown: [F] float64, timestamp of each frame's picture; at most k / fps.
        fps: frames sampled a second: frame k stands for [k / fps, (k + 1) / fps).
    """

    shown: npt.NDArray[np.float64]
    fps: float

    @property
    def starts(self) -> npt.NDArray[np.float64]:
        """[F] seconds at which the frames were sampled."""
        return np.arange(len(self.shown)) / self.fps

    def summary(self) -> dict[str, float]:
        """How much was sampled, for meta.json: a file that ends early shows here."""
        return {"frames": len(self.shown), "seconds": len(self.shown) / self.fps, "fps": self.fps}

    def held_out(self, spans: Sequence[SpanSpec]) -> npt.NDArray[np.int64]:
        """[F] number of the span that a frame lies in; -1: in none; -2: on the edge of one.

        A frame on an edge goes to neither split. A frame lies in a span when both its picture and
        its moment do, and touches it when anything from its picture's timestamp to the next
        frame's moment does: where the file has fewer frames than are sampled, a picture of the
        span may still be on screen after it.
        """
        inside = np.full(len(self.shown), -1, dtype=np.int64)
        first = np.minimum(self.shown, self.starts)
        for number, span in enumerate(spans):
            touches = touching(self.starts, self.shown, self.fps, [span])
            whole = (first >= span.start - _EPSILON) & (self.starts < span.end - _EPSILON)
            inside[touches] = -2
            inside[whole] = number
        return inside


def touching(
    times: npt.NDArray[np.float64],
    shown: npt.NDArray[np.float64],
    fps: float,
    spans: Sequence[SpanSpec],
) -> npt.NDArray[np.bool_]:
    """Whether frames have anything of a span in them, wholly or at an edge.

    Args:
        times: [F] the frames' moments.
        shown: [F] when their pictures appeared.
        fps: a frame stands for the 1 / fps seconds from its moment on.
        spans: stretches of the same clock.

    Returns:
        [F] bool.
    """
    inside = np.zeros(len(times), dtype=np.bool_)
    first = np.minimum(times, shown)
    for span in spans:
        inside |= (first < span.end - _EPSILON) & (times + 1 / fps > span.start + _EPSILON)
    return inside


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames [start, start + length) of a sampled video, with the caption that covers most."""

    start: int
    length: int
    caption: str | None
    held_out: bool


def cut_clips(
    timeline: Timeline,
    *,
    length: int,
    stride: int,
    held_out: Sequence[SpanSpec],
    captions: Sequence[CaptionSpec],
) -> list[Clip]:
    """All clips of a video, in order of time.

    A clip lies wholly inside one held-out stretch, or touches none. Each stretch, and each run of
    frames between them, is cut from its first frame on.

    Args:
        timeline: when the frames are on screen.
        length: frames of a clip.
        stride: frames from one clip's start to the next one's.
        held_out: stretches kept for validation.
        captions: what is to be seen, by stretch.
    """
    membership = timeline.held_out(held_out)
    edges = np.flatnonzero(np.diff(membership)) + 1
    clips = []
    for run in np.split(np.arange(len(membership)), edges):
        if len(run) == 0 or membership[run[0]] == -2:
            continue
        for start in range(int(run[0]), int(run[-1]) - length + 2, stride):
            caption = _caption(captions, start / timeline.fps, (start + length) / timeline.fps)
            clips.append(Clip(start, length, caption, held_out=bool(membership[start] >= 0)))
    return clips


def _caption(captions: Sequence[CaptionSpec], start: float, end: float) -> str | None:
    """The caption that covers most of [start, end); the earlier in the recipe of equals."""
    best, best_covered = None, 0.0
    for caption in captions:
        covered = min(end, caption.end) - max(start, caption.start)
        if covered > best_covered + _EPSILON:
            best, best_covered = caption.text, covered
    return best
