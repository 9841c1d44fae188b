"""The limit of a gang's silence, from the pace of its steps."""

from __future__ import annotations

import pytest

from ringworld_platform.pace import CEILING_SECONDS, LEAST_COLLECTIVE_SECONDS, START_SECONDS, Pace


def paced(*seconds: float) -> Pace:
    """After a first step, which does not count, steps of these seconds."""
    pace = Pace()
    for each in (1000.0, *seconds):
        pace.step(each)
    return pace


def test_a_gang_that_has_no_pace_yet_is_given_time() -> None:
    pace = Pace()
    assert pace.limit(["forward"]).seconds == START_SECONDS
    pace.step(0.1)
    limit = pace.limit(["forward"])
    assert (limit.seconds, limit.why) == (START_SECONDS, "the limit until two steps are done")


def test_long_steps_are_given_the_time_that_they_are_foretold_to_take() -> None:
    pace = Pace()
    pace.expect(20.0)
    assert pace.limit(["load"]).seconds == START_SECONDS
    pace.expect(90.0)
    limit = pace.limit(["forward"])
    assert (limit.seconds, limit.why) == (900.0, "10 x what a step is expected to take")
    pace.expect(4000.0)
    assert pace.limit(["forward"]).seconds == CEILING_SECONDS
    pace.step(9.0)
    pace.step(9.0)
    assert pace.limit(["forward"]).seconds == 90.0, "what was measured counts"


@pytest.mark.parametrize(
    ("steps", "seconds", "why"),
    [
        ([0.2], 30.0, "10 x the last step, at least 30 s"),
        ([4.0, 5.0, 3.0], 50.0, "10 x the longest of the last 3 steps"),
        ([9.0, *[4.0] * 20], 40.0, "10 x the longest of the last 20 steps"),
        ([60.0], 600.0, "10 x the last step"),
        ([400.0, 1.0], CEILING_SECONDS, "10 x the longest of the last 2 steps, at most 1800 s"),
    ],
)
def test_the_limit_follows_the_steps(steps: list[float], seconds: float, why: str) -> None:
    limit = paced(*steps).limit(["forward", "boundary", "backward", "optimizer"])

    assert (limit.seconds, limit.why) == (seconds, why)


@pytest.mark.parametrize("phase", ["checkpoint", "validation", "load", "data", "books 3/9"])
def test_what_goes_on_between_steps_is_given_time(phase: str) -> None:
    limit = paced(0.2).limit(["forward", phase])
    assert (limit.seconds, limit.why) == (START_SECONDS, f"the limit in {phase}")
    assert paced(60.0).limit([phase]).seconds == 600.0, "long steps, long saves"


def test_a_limit_of_the_spec_holds_everywhere() -> None:
    pace = Pace(7.0)
    pace.step(1.0)
    pace.step(1.0)

    for phase in ("forward", "checkpoint"):
        assert pace.limit([phase]).seconds == 7.0
        assert pace.limit([phase]).why == "recovery.stall_timeout"
    assert pace.collective_seconds == LEAST_COLLECTIVE_SECONDS
    assert Pace(400.0).collective_seconds == 800.0
    assert Pace().collective_seconds == 2 * CEILING_SECONDS
