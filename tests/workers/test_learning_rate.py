"""The learning rate at the edges of its schedule."""

from __future__ import annotations

import pytest

from ringworld_jobs.spec import LearningRateSpec
from ringworld_workers.learning_rate import learning_rate_at


def rates(num_steps: int, **spec: object) -> list[float]:
    parsed = LearningRateSpec.model_validate({"peak": 1.0, **spec})
    return [learning_rate_at(parsed, step, num_steps) for step in range(num_steps)]


def test_a_warm_up_wastes_no_step_and_reaches_the_peak() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_constant_rate_is_constant() -> None:
    assert rates(3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_a_cosine_falls_from_the_peak_to_its_end_at_the_last_step(warmup: int) -> None:
    found = rates(12, schedule="cosine", final=0.1, warmup_steps=warmup)
    assert found[warmup] == 1.0
    assert found[-1] == pytest.approx(0.1, abs=1e-12)
    fall = found[warmup:]
    assert all(later < earlier for earlier, later in zip(fall, fall[1:], strict=False))
    # Symmetric about its middle.
    for early, late in zip(fall, reversed(fall), strict=True):
        assert early + late == pytest.approx(1.1, abs=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_stage_that_is_all_warm_up_ends_below_or_at_the_peak(num_steps: int) -> None:
    found = rates(num_steps, schedule="cosine", warmup_steps=3)
    assert found == pytest.approx([(step + 1) / 3 for step in range(num_steps)])


def test_a_single_step_is_taken_at_the_peak() -> None:
    assert rates(1, schedule="cosine") == [1.0]
