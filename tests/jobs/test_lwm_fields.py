"""LWM's field syntax: what it says, and where a slip stands."""

from __future__ import annotations

import pytest

from ringworld_jobs.lwm_fields import Field, parse_layout


def test_a_layout_in_full() -> None:
    layout = "<|bos|>,[system+question],vision,my answer,[<|eos|>]"
    assert parse_layout(layout, codes=True) == (
        Field((), True, 1, "bos"),
        Field(("system", "question"), False, 9),
        Field(("vision",), True, 27),
        Field(("my answer",), True, 34),
        Field((), False, 44, "eos"),
    )


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        # The example in the release's own documentation, which fails there with a KeyError.
        (
            "[vision+question],answer",
            r"field 1 at character 1: codes .* comma.*write '\[vision\],\[question\],answer'",
        ),
        ("a,,b", "field 2 at character 3: is empty"),
        ("", "field 1 at character 1: is empty"),
        ("a,[]", "field 2 at character 3: is empty"),
        ("[a,b]", "field 1 at character 1: brackets hold exactly one field"),
        ("a,b]", "field 2 at character 3: brackets"),
        ("a,[[b]]", "field 2 at character 3: brackets"),
        ("x,a+", "field 2 at character 3: nothing stands on one side"),
        ("a+<|eos|>", r"a token is joined by comma.*write 'a,<\|eos\|>'"),
    ],
)
def test_slips_are_named_with_their_place(layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layout(layout, codes=True)


def test_without_a_codebook_every_key_is_text() -> None:
    assert parse_layout("television+title", codes=False)[0].keys == ("television", "title")
