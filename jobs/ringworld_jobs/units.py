"""Numbers as people write them: 32Ki tokens, 4.8B tokens, 15min, 20 steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
DECIMAL = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600, "d": 86400}

SHORTEST_CONTEXT = 16
"""Fewest tokens of a row: a caption of a few words and its delimiters."""

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_COUNT = re.compile(_NUMBER + r"\s*(Ki|Mi|Gi|Ti|K|M|B|T)?")
_DURATION = re.compile(_NUMBER + r"\s*(s|sec|min|h|d)")
_STEPS = re.compile(r"([0-9]+)\s*steps?")


def parse_count(value: Any) -> int:
    """Turn ``4096``, ``"4Ki"`` or ``"4.8B"`` into a whole number of at least 1.

    Ki, Mi, Gi, Ti are binary; K, M, B, T are decimal.

    Raises:
        ValueError: not a number with such a unit, not whole, or below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected a count such as 4096, 32Ki or 4.8B")
    try:
        number = _exact(value)
    except ArithmeticError:
        raise ValueError("expected a count, and this number is not finite") from None
    if number != number.to_integral_value():
        raise ValueError(f"a count is whole, and this comes to {number.normalize():f}")
    if number < 1:
        raise ValueError("a count is at least 1")
    return int(number)


def _exact(value: int | float | str) -> Decimal:
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip())
        if match is None:
            raise ValueError(
                "cannot be read as a count; write 4096, or use Ki Mi Gi Ti (binary) "
                "or K M B T (decimal)"
            )
        return Decimal(match[1]) * (BINARY | DECIMAL).get(match[2] or "", 1)
    number = Decimal(repr(value))
    if not number.is_finite():
        raise ArithmeticError
    return number


def parse_context_length(value: Any) -> int:
    """Read a context length; a decimal unit or a round decimal number is probably a slip.

    Raises:
        ValueError: a decimal unit (``32K``) or a bare multiple of 1,000 such as 1000000, with the
            binary length that was probably meant; or a length too short for any example.
    """
    tokens = parse_count(value)
    unit = value.strip()[-1] if isinstance(value, str) else ""
    if unit in ("K", "M", "B", "T") or (unit != "i" and tokens % 1000 == 0):
        raise ValueError(
            f"context lengths are binary and this one is decimal; did you mean "
            f"{binary_name(tokens)}?"
        )
    if tokens < SHORTEST_CONTEXT:
        raise ValueError(f"a context holds at least {SHORTEST_CONTEXT} tokens; write 1Ki or more")
    return tokens


def binary_name(tokens: int) -> str:
    """The binary length nearest to a decimal one: 32,000 gives 32Ki, 1,000,000 gives 1Mi."""
    if tokens >= 10**6:
        return f"{max(1, round(tokens / 10**6))}Mi"
    return f"{max(1, round(tokens / 10**3))}Ki"


def format_tokens(tokens: int) -> str:
    """Write a token count with the binary unit where it is exact: 16384 gives 16Ki."""
    for unit, size in reversed(BINARY.items()):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def parse_seconds(value: Any) -> float:
    """Turn ``"15min"``, ``"90s"``, ``"2h"`` into seconds; a bare number is refused as ambiguous.

    Raises:
        ValueError: no unit, an unknown one, or not above zero.
    """
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected a duration with its unit (s, min, h, d): 90s, 15min, 2h")
    seconds = float(Decimal(match[1]) * SECONDS[match[2]])
    if seconds <= 0:
        raise ValueError("a duration is above zero")
    return seconds


def format_seconds(seconds: float) -> str:
    """Write seconds so that ``parse_seconds`` gives the same float back: no exponent, no loss."""
    return f"{Decimal(repr(float(seconds))):f}".removesuffix(".0") + "s"


@dataclass(frozen=True, slots=True)
class Interval:
    """How often something is due: every so many steps, or every so many seconds (one of them)."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """Write it as a spec would."""
        if self.steps is not None:
            return f"{self.steps} steps"
        return format_seconds(self.seconds or 0.0)

    def due(self, steps_since: int, seconds_since: float) -> bool:
        """Whether it is due, given what has passed since the last time."""
        if self.steps is not None:
            return steps_since >= self.steps
        return self.seconds is not None and seconds_since >= self.seconds


def parse_interval(value: Any) -> Interval:
    """Turn ``"15min"`` or ``"20 steps"`` into an Interval.

    Raises:
        ValueError: neither a duration nor a number of steps, or not above zero.
    """
    if isinstance(value, Interval):
        return value
    match = _STEPS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        if int(match[1]) == 0:
            raise ValueError("an interval of 0 steps is never due; write 1 steps or more")
        return Interval(steps=int(match[1]))
    if isinstance(value, str) and _DURATION.fullmatch(value.strip()):
        return Interval(seconds=parse_seconds(value))
    raise ValueError("expected an interval with its unit: 15min, 90s or 20 steps")


def _spell_length(tokens: int) -> int | str:
    # 125Ki is 128,000 tokens, which read back as a bare number would look like a decimal slip.
    name = format_tokens(tokens)
    return name if name.endswith("i") else tokens


Tokens = Annotated[
    int,
    BeforeValidator(parse_count, json_schema_input_type=int | str),
    Field(json_schema_extra={"examples": ["4Ki", "4.8B"]}),
]
Bytes = Annotated[
    int,
    BeforeValidator(parse_count, json_schema_input_type=int | str),
    Field(json_schema_extra={"examples": ["64Gi", "2T"]}),
]
ContextLength = Annotated[
    int,
    BeforeValidator(parse_context_length, json_schema_input_type=int | str),
    PlainSerializer(_spell_length, return_type=int | str, when_used="json"),
    Field(json_schema_extra={"examples": ["32Ki", "1Mi"]}),
]
Seconds = Annotated[
    float,
    BeforeValidator(parse_seconds, json_schema_input_type=str),
    PlainSerializer(format_seconds, return_type=str),
    Field(json_schema_extra={"examples": ["300s", "15min"]}),
]
Every = Annotated[
    Interval,
    BeforeValidator(parse_interval, json_schema_input_type=str),
    PlainSerializer(str, return_type=str),
    Field(json_schema_extra={"examples": ["15min", "20 steps"]}),
]
