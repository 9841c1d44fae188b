"""Clips and held-out stretches."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_jobs.recipe import CaptionSpec, SpanSpec
from ringworld_workers.data.clips import Timeline, cut_clips


def steady(frames: int, fps: float) -> Timeline:
    return Timeline(np.arange(frames) / fps, fps)


def starts(timeline: Timeline, spans: list[SpanSpec], **how: int) -> tuple[list[int], list[int]]:
    clips = cut_clips(timeline, held_out=spans, captions=[], **how)
    return [c.start for c in clips if not c.held_out], [c.start for c in clips if c.held_out]


def test_runs_are_cut_from_their_first_frame() -> None:
    train, held_out = starts(steady(20, 2), [SpanSpec(start=4, end=7)], length=3, stride=2)
    # The span is frames 8..13; before it 0..7, after it 14..19.
    assert train == [0, 2, 4, 14, 16]
    assert held_out == [8, 10]


def test_a_picture_of_the_stretch_that_is_still_on_screen_after_it_is_not_trained_on() -> None:
    # One picture a second, sampled at 4 fps; the span ends 0.5 s after its last picture appeared.
    timeline = Timeline(np.floor(np.arange(16) / 4), 4)
    train, held_out = starts(timeline, [SpanSpec(start=1, end=2.5)], length=1, stride=1)
    # Frames 10, 11 show the picture of second 2, which the span holds.
    assert train == [0, 1, 2, 3, 12, 13, 14, 15]
    assert held_out == [4, 5, 6, 7, 8, 9]


def test_a_clip_takes_the_caption_that_covers_most_of_it() -> None:
    captions = [
        CaptionSpec(start=0, end=1.25, text="first"),
        CaptionSpec(start=1.25, end=3, text="second"),
    ]
    clips = cut_clips(steady(16, 4), length=4, stride=2, held_out=[], captions=captions)
    assert [c.caption for c in clips] == [
        "first",  # 0 to 1 s
        "first",  # 0.5 to 1.5 s: 0.75 s of the first
        "second",  # 1 to 2 s
        "second",
        "second",
        "second",  # 2.5 to 3.5 s: half of it
        None,  # 3 to 4 s
    ]


@st.composite
def _spans(draw: st.DrawFn) -> list[SpanSpec]:
    edges = sorted(draw(st.lists(st.floats(0, 12), min_size=0, max_size=6, unique=True)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return [SpanSpec(start=a, end=max(b, a + 1e-3)) for a, b in pairs]


@settings(deadline=None)
@given(
    spans=_spans(),
    fps=st.sampled_from([1.0, 3.0, 4.0, 8.0, 29.97]),
    rate=st.sampled_from([2.0, 7.5, 24.0, 30.0]),
    length=st.integers(1, 12),
    stride=st.integers(1, 12),
)
def test_no_training_clip_overlaps_a_held_out_stretch(
    spans: list[SpanSpec], fps: float, rate: float, length: int, stride: int
) -> None:
    moments = np.arange(int(10 * fps)) / fps
    timeline = Timeline(np.floor(moments * rate + 1e-9) / rate, fps)
    for clip in cut_clips(timeline, length=length, stride=stride, held_out=spans, captions=[]):
        frames = range(clip.start, clip.start + clip.length)
        assert frames[-1] < len(moments)
        times = np.concatenate([moments[frames], timeline.shown[frames]])
        inside = [((times >= s.start) & (times < s.end)) for s in spans]
        if clip.held_out:
            # A microsecond's grace at the edges, for the rounding of k / fps.
            assert any(
                (times >= s.start - 2e-6).all() and (times < s.end + 2e-6).all() for s in spans
            )
        else:
            assert not any(i.any() for i in inside)
            end = times.max() + 1 / fps
            covered = [s for s in spans if s.start < end - 2e-6 and s.end > times.min() + 2e-6]
            assert not covered
