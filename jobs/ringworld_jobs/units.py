"""Numbers as people write them: 32Ki tokens, 4.8B tokens, 15min, 2GiB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
DECIMAL = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(Ki|Mi|Gi|Ti|K|M|B|T)?")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|sec|min|h|d)")
_STEPS = re.compile(r"([0-9]+)\s*steps?")


def parse_count(value: Any) -> int:
    """Turn ``4096``, ``"4Ki"`` or ``"4.8B"`` into a whole number.

    Ki, Mi, Gi, Ti are binary; K, M, B, T are decimal.

    Raises:
        ValueError: not a number with such a unit, or not whole.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a count such as 4096, 32Ki or 4.8B, got {value!r}")
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip())
        if match is None:
            raise ValueError(
                f"cannot read {value!r} as a count; write 4096, or use Ki Mi Gi (binary) or K M B T (decimal)"
            )
        number = float(match[1]) * (BINARY | DECIMAL).get(match[2] or "", 1)
    else:
        number = float(value)
    if abs(number - round(number)) > 1e-6:
        raise ValueError(f"{value!r} is not a whole number")
    return round(number)


def parse_context_length(value: Any) -> int:
    """Read a context length; a decimal unit or a round decimal number is probably a slip.

    Raises:
        ValueError: a decimal unit (``32K``) or a multiple of 1,000 such as 1000000; says the
            binary length that was probably meant.
    """
    tokens = parse_count(value)
    decimal_unit = isinstance(value, str) and value.strip()[-1] in "KMBT"
    if decimal_unit or (tokens >= 1000 and tokens % 1000 == 0):
        raise ValueError(
            f"context length {value!r} is decimal; lengths are binary here: did you mean {binary_name(tokens)}?"
        )
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
        ValueError: no unit, or an unknown one.
    """
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f"expected a duration with its unit, such as 90s, 15min or 2h, got {value!r}"
        )
    return float(match[1]) * SECONDS[match[2]]


@dataclass(frozen=True, slots=True)
class Interval:
    """How often something is due: every so many steps, or every so many seconds (one of them)."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """Write it as a spec would."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:g}s"

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
    try:
        seconds = parse_seconds(value)
    except ValueError as error:
        raise ValueError(
            f"expected an interval such as 15min or 20 steps, got {value!r}"
        ) from error
    if seconds <= 0:
        raise ValueError(f"an interval must be above zero, got {value!r}")
    return Interval(seconds=seconds)


Tokens = Annotated[int, BeforeValidator(parse_count, json_schema_input_type=int | str)]
ContextLength = Annotated[
    int, BeforeValidator(parse_context_length, json_schema_input_type=int | str)
]
Seconds = Annotated[
    float,
    BeforeValidator(parse_seconds, json_schema_input_type=str),
    PlainSerializer(lambda seconds: f"{seconds:.10g}s", return_type=str),
]
Every = Annotated[
    Interval,
    BeforeValidator(parse_interval, json_schema_input_type=str),
    PlainSerializer(str, return_type=str),
]
