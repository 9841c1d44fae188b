"""Frames, delimiters and layouts as tokens."""

from __future__ import annotations

import numpy as np
import pytest

from ringworld_model.tokens import (
    VISION_END,
    VISION_START,
    Span,
    clip_example,
    frames_of,
    join_spans,
    text_example,
    vision_tokens,
)


def test_a_frame_is_its_codes_and_an_end() -> None:
    codes = np.random.default_rng(0).integers(0, 8192, (3, 256))
    tokens = vision_tokens(codes, 8192)
    assert tokens.dtype == np.int32
    assert len(tokens) == 3 * 257
    assert tokens[256::257].tolist() == [8192, 8192, 8193]
    assert np.array_equal(frames_of(tokens, 256, 8192), codes)
    assert vision_tokens(codes[:1], 8192)[-1] == 8193, "an image ends in eov"
    assert (VISION_START, VISION_END) == ("<vision>", "</vision>")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 8, 3, 4], "not whole frames of 2 codes"),
        ([], "not whole frames"),
        ([1, 2, 9, 3, 4, 9], "frame 0 ends in id 9, expected 8"),
        ([1, 2, 8, 3, 4, 8], "frame 1 ends in id 8, expected 9"),
        ([1, 2, 8, 3, 8, 9], "frame 1 holds an id outside the codebook of 8 codes"),
    ],
)
def test_broken_framing_is_refused(tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frames_of(tokens, 2, 8)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([1, 2], r"codes have shape \(2,\)"),
        (np.zeros((0, 4), int), r"codes have shape \(0, 4\)"),
        ([[1, 8]], "codes span 1..8, outside a codebook of 8"),
        ([[-1, 2]], "codes span -1..2"),
    ],
)
def test_codes_outside_the_format_are_refused(codes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision_tokens(codes, 8)  # type: ignore[arg-type]


def test_layouts() -> None:
    arguments = {"start_ids": [20, 21], "end_ids": [22], "codebook_size": 8}
    codes = [[0, 1], [2, 3]]
    example = clip_example([5, 6], codes, layout="text,vision", **arguments)
    assert example.tokens.tolist() == [5, 6, 20, 21, 0, 1, 8, 2, 3, 9, 22]
    assert example.modality.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert example.targets.tolist() == [6, 20, 21, 0, 1, 8, 2, 3, 9, 22, 0]
    assert example.target_modality.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert example.loss_mask.tolist() == [1] * 10 + [0]
    other = clip_example([5, 6], codes, layout="vision,text", **arguments)
    assert other.tokens.tolist() == [20, 21, 0, 1, 8, 2, 3, 9, 22, 5, 6]
    with pytest.raises(ValueError, match="layout='vision' is unknown; use one of text,vision"):
        clip_example([5], codes, layout="vision", **arguments)  # type: ignore[arg-type]


def test_the_last_target_counts_only_where_something_follows() -> None:
    assert text_example([5, 6]).loss_mask.tolist() == [1, 0]
    piece = text_example([5, 6], following_id=7)
    assert (piece.targets.tolist(), piece.loss_mask.tolist()) == ([6, 7], [1, 1])
    cut = join_spans([Span([5, 6], 0)], following=Span([3, 4], 1))
    assert len(cut) == 2
    assert (cut.targets.tolist(), cut.target_modality.tolist()) == ([6, 3], [0, 1])
    assert text_example([5]).loss_mask.tolist() == [0]
    assert len(text_example([])) == 0


def test_a_span_without_loss_is_not_a_target() -> None:
    example = join_spans([Span([5, 6], 0, loss=False), Span([7, 8], 0), Span([9], 0, loss=False)])
    assert example.targets.tolist() == [6, 7, 8, 9, 0]
    assert example.loss_mask.tolist() == [0, 1, 1, 0, 0]
