"""Which rank is called slow, and for how long."""

from __future__ import annotations

import pytest

from ringworld_platform.slow_rank import STEPS_SEEN, Change, SlowRanks


def told(slow: SlowRanks, times: list[list[float]], **more: float) -> list[Change]:
    return [change for step in times for change in slow.step(step, more.pop("whole", 1.0), **more)]


def test_an_episode_is_told_when_it_begins_and_when_it_ends() -> None:
    slow = SlowRanks()
    even, odd = [0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.48]

    assert told(slow, [even] * 50) == []
    (begins,) = told(slow, [odd] * 50)
    assert (begins.rank, round(begins.ratio or 0, 2)) == (3, 2.4)
    assert list(slow.ratios) == [3]
    assert told(slow, [even] * 50) == [Change(3, None)]
    assert slow.ratios == {}
    assert len(told(slow, [odd] * 50)) == 1, "another episode"


def test_the_first_steps_and_single_slips_say_nothing() -> None:
    slow = SlowRanks()
    assert told(slow, [[0.1, 0.9]] * (STEPS_SEEN - 1)) == []

    slips = SlowRanks()
    steps = [[0.2, 5.0] if number % 3 == 0 else [0.2, 0.2] for number in range(60)]
    assert told(slips, steps) == [], "less than half of the steps"


@pytest.mark.parametrize(
    ("times", "imbalance"),
    [
        ([0.2, 0.39], 1.0),  # not twice
        ([0.01, 0.05], 1.0),  # four hundredths of a step
        ([0.2, 0.6], 1.9),  # a layout that gives the last rank the most to do
        ([0.0, 0.0], 1.0),
        ([0.5], 1.0),
    ],
)
def test_who_is_not_slow(times: list[float], imbalance: float) -> None:
    assert told(SlowRanks(), [times] * 30, imbalance=imbalance) == []


def test_two_of_eight_may_be_slow() -> None:
    changes = told(SlowRanks(), [[0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.4, 0.1]] * 12)

    assert [change.rank for change in changes] == [2, 6]
