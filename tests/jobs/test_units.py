"""Numbers with units: what is read, what is refused, and that nothing is lost on the way back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringworld_jobs.units import (
    BINARY,
    DECIMAL,
    SECONDS,
    Interval,
    binary_name,
    format_seconds,
    format_tokens,
    parse_context_length,
    parse_count,
    parse_interval,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096),
        ("4096", 4096),
        (1e6, 10**6),
        ("4Ki", 4096),
        ("1.5 Mi", 3 * 2**19),
        ("4.8B", 4_800_000_000),
        ("0.3B", 300_000_000),
        ("363B", 363 * 10**9),
        (2**70 + 1, 2**70 + 1),
    ],
)
def test_counts(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4 Kib", "Ki Mi Gi"),
        ("4k", "Ki Mi Gi"),
        ("-4", "cannot be read"),
        ("", "cannot be read"),
        (-4, "at least 1"),
        (0, "at least 1"),
        (1.5, "whole"),
        ("1.0001Ki", "comes to 1024.1024"),
        (True, "expected a count"),
        (None, "expected a count"),
        ([4], "expected a count"),
        (math.inf, "not finite"),
        (math.nan, "not finite"),
    ],
)
def test_what_is_not_a_count(text: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_count(text)


@given(st.integers(1, 10**6), st.sampled_from(sorted(BINARY | DECIMAL)))
def test_a_count_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_count(f"{number}{unit}") == number * (BINARY | DECIMAL)[unit]


@given(st.integers(1, 2**60))
def test_formatted_tokens_read_back(tokens: int) -> None:
    assert parse_count(format_tokens(tokens).replace(",", "")) == tokens


@given(st.integers(16, 2**40))
def test_a_context_length_is_exact_or_refused_with_a_binary_one(tokens: int) -> None:
    if tokens % 1000:
        assert parse_context_length(tokens) == tokens
        return
    with pytest.raises(ValueError, match="decimal") as caught:
        parse_context_length(tokens)
    parse_context_length(binary_name(tokens))
    assert binary_name(tokens) in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("32K", "32Ki"), ("1M", "1Mi"), (32000, "32Ki"), (1e6, "1Mi"), ("128000", "128Ki")],
)
def test_decimal_context_lengths_name_the_binary_one(written: object, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {meant}"):
        parse_context_length(written)


def test_a_binary_unit_is_never_decimal() -> None:
    assert parse_context_length("125Ki") == 128_000


@given(st.floats(1e-12, 1e12))
def test_seconds_read_back_exactly(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == seconds
    interval = Interval(seconds=seconds)
    assert parse_interval(str(interval)) == interval


@given(st.integers(1, 10**9), st.sampled_from(sorted(SECONDS)))
def test_durations(number: int, unit: str) -> None:
    assert parse_seconds(f"{number}{unit}") == number * SECONDS[unit]


@pytest.mark.parametrize("text", ["15", 15, "15 minutes", "min", "-1s", "0s", None, True])
def test_a_duration_needs_a_unit_and_is_above_zero(text: object) -> None:
    with pytest.raises(ValueError, match=r"duration"):
        parse_seconds(text)


@given(st.integers(1, 10**9))
def test_step_intervals(steps: int) -> None:
    assert parse_interval(f"{steps} steps") == Interval(steps=steps)
    assert parse_interval(str(Interval(steps=steps))) == Interval(steps=steps)


def test_an_interval_is_due_when_it_has_passed() -> None:
    assert [Interval(steps=20).due(n, 1e9) for n in (19, 20)] == [False, True]
    assert [Interval(seconds=5.0).due(10**9, s) for s in (4.9, 5.0)] == [False, True]


@pytest.mark.parametrize("text", ["20", 20, "0 steps", "0s", "often", None, [1]])
def test_what_is_not_an_interval(text: object) -> None:
    with pytest.raises(ValueError, match="interval|above zero"):
        parse_interval(text)
