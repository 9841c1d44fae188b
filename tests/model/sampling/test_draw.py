"""Draws: the settings keep what they say, seeds repeat, and penalties touch what was written."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_model.sampling import Allowed, DrawSettings, SamplingSettings
from ringworld_model.sampling.draw import draw, penalised, restrict
from ringworld_model.sampling.guidance import guided

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


def drawn(logits: torch.Tensor, times: int = 300, **changes: float) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return [draw(logits, DrawSettings(**changes), generator) for _ in range(times)]


def test_draws_follow_the_probabilities() -> None:
    found = torch.tensor(drawn(LOGITS, 4000, temperature=2.0)).bincount(minlength=5) / 4000
    assert (found - (LOGITS / 2).softmax(0)).abs().max() < 0.03


def test_each_setting_keeps_the_ids_that_it_says() -> None:
    assert set(drawn(LOGITS, temperature=0)) == {0} == set(drawn(LOGITS, top_k=1))
    assert set(drawn(LOGITS, top_k=2, temperature=9.0)) == {0, 1}
    shares = LOGITS.softmax(0).cumsum(0)
    # The first two hold less than that, the first three more.
    assert shares[1] < 0.85 < shares[2]
    assert set(drawn(LOGITS, top_p=0.85)) == {0, 1, 2}
    assert set(drawn(LOGITS, top_p=1e-9)) == {0}
    assert set(drawn(LOGITS, min_p=math.exp(-1.6))) == {0, 1, 2}
    assert set(drawn(LOGITS, temperature=9.0)) == {0, 1, 2, 3, 4}
    assert set(drawn(LOGITS, temperature=1e-320)) == {0}


def test_a_seed_repeats_and_greedy_draws_do_not_shift_it() -> None:
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    wide = DrawSettings()
    draw(LOGITS, DrawSettings(temperature=0), first)
    draw(LOGITS, wide, second)
    assert [draw(LOGITS, wide, first) for _ in range(9)] == [
        draw(LOGITS, wide, second) for _ in range(9)
    ]
    assert drawn(LOGITS, 40) == drawn(LOGITS, 40)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=9),
    st.sampled_from([0.0, 1e-320, 1e-3, 1.0, 50.0]),
    st.integers(0, 9),
    st.sampled_from([1e-6, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 99),
)
def test_no_draw_leaves_what_is_allowed(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    asked = DrawSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    generator = torch.Generator().manual_seed(seed)
    for allowed in (Allowed(1, range(1, 2)), Allowed(0, (1,)), Allowed(0, None, (0,))):
        found = draw(restrict(torch.tensor(logits), allowed), asked, generator)
        assert allowed.contains(found) and found < len(logits)


def test_penalties() -> None:
    asked = DrawSettings(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    found = penalised(LOGITS, asked, [4], [0, 3, 0])
    expected = torch.tensor([1.0 - 0.5 - 0.5, 1.0, 0.5, -2.0 - 0.75, -6.0])
    torch.testing.assert_close(found, expected)
    assert LOGITS[0] == 2.0
    assert not DrawSettings().repeats and asked.repeats


def test_guidance() -> None:
    other = torch.zeros(5)
    assert torch.equal(guided(LOGITS, other, 1.0), LOGITS)
    assert torch.equal(guided(LOGITS, other, 5.0), 5 * LOGITS)


def test_what_means_nothing_is_refused() -> None:
    for changes, words in (
        ({"temperature": -1.0}, "temperature=-1.0: give a number from 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: give a number above 0 to 1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: give a number from 0.01 to 100"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40"),
    ):
        with pytest.raises(ValueError, match=words):
            DrawSettings(**changes)
    for changes, words in (
        ({"max_new_tokens": 0}, "max_new_tokens=0 is below 1"),
        ({"stop": ("a", "")}, "an empty text"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf"),
        ({"seed": 1 << 64}, "more than 64 bits"),
    ):
        with pytest.raises(ValueError, match=words):
            SamplingSettings(**changes)
    for logits in (torch.tensor([math.nan, 1.0]), torch.full((2,), -torch.inf)):
        with pytest.raises(ValueError, match="the largest logit is"):
            draw(logits, DrawSettings(), torch.Generator())
