"""When an exception is held to come back for ever."""

from __future__ import annotations

from ringworld_platform.recovery import Failure, FailureKind
from ringworld_platform.repeats import Repeats

ERROR = Failure(FailureKind.ERROR, "rank 1: RuntimeError: CUDA error: device-side assert", 1)
SAME = Failure(FailureKind.ERROR, "rank 0: RuntimeError: CUDA error: device-side assert", 0)
LOST = Failure(FailureKind.WORKER_LOST, "rank 1 (pid 3) was lost", 1)


def test_the_same_words_in_the_same_step_twice_in_a_row() -> None:
    repeats = Repeats()
    assert repeats.explain(ERROR, 0, 7) is None
    told = repeats.explain(SAME, 0, 7)
    assert told is not None
    assert told.startswith(SAME.text) and "the same exception in the same step (7)" in told


def test_another_step_stage_text_or_kind_is_something_else() -> None:
    other = Failure(FailureKind.ERROR, "rank 1: RuntimeError: out of luck", 1)
    for failure, stage, step in [(ERROR, 0, 8), (ERROR, 1, 7), (other, 0, 7), (LOST, 0, 7)]:
        repeats = Repeats()
        assert repeats.explain(ERROR, 0, 7) is None
        assert repeats.explain(failure, stage, step) is None
        assert repeats.explain(ERROR, 0, 7) is None, "not in a row"
    repeats = Repeats()
    assert [repeats.explain(LOST, 0, 7) for _ in range(3)] == [None] * 3
