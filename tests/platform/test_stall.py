"""Which rank of a silent gang is the odd one, and in what words."""

from __future__ import annotations

import pytest

from ringworld_platform.pace import Limit
from ringworld_platform.recovery import Failure
from ringworld_platform.stall import diagnose, moved_on
from ringworld_workers.actor import Examined
from ringworld_workers.recorder import Progress
from ringworld_workers.stacks import ProcessLook, Stacks

LIMIT = Limit(31.0, "10 x the longest of the last 20 steps, at least 30 s")
PLACES = [f"pid {100 + rank} on 10.0.0.{rank}" for rank in range(8)]


def doing(step: int, phase: str = "backward", *, at: str = "", waits_in: str = "") -> Examined:
    return Examined(Progress(phase, step, 0.0, 4 * step), Stacks("", at, waits_in))


WAITING = doing(7, waits_in="all_reduce")


def stalled(answers: dict[int, Examined], waiting: set[int] | None = None) -> Failure:
    looks = {6: ProcessLook("is stopped by a signal (SIGSTOP)")}
    return diagnose(answers, looks, PLACES, waiting or set(range(8)), LIMIT)


def test_a_rank_that_does_not_answer_is_the_odd_one() -> None:
    failure = stalled({rank: WAITING for rank in range(8) if rank != 6})

    assert failure.rank == 6
    assert failure.text == (
        "no progress for 31 s (10 x the longest of the last 20 steps, at least 30 s): rank 6 "
        "(pid 106 on 10.0.0.6) does not answer: its process is stopped by a signal (SIGSTOP) "
        "(ranks 0-5, 7 are in backward of step 7, waiting in all_reduce)"
    )


def test_many_silent_ranks_are_counted() -> None:
    failure = stalled({0: WAITING})

    assert failure.rank == 1
    assert "rank 4 (pid 104 on 10.0.0.4) does not answer; 3 more do not answer" in failure.text


def test_the_rank_that_waits_for_nobody_is_the_odd_one_whatever_its_step() -> None:
    answers = dict.fromkeys(range(8), WAITING)
    answers[3] = doing(9, "data", at="read (shards.py:12)")

    failure = stalled(answers)

    assert failure.rank == 3
    assert "does not come: it is in data of step 9, at read (shards.py:12) (ranks" in failure.text


def test_a_rank_that_has_ended_before_the_others_is_the_odd_one() -> None:
    failure = stalled(dict.fromkeys(range(8), WAITING), waiting=set(range(7)))

    assert failure.rank == 7
    assert "rank 7 (pid 107 on 10.0.0.7) has ended its stage, and others wait" in failure.text


@pytest.mark.parametrize("waits_in", ["", "all_reduce"])
def test_else_the_rank_that_is_behind_is(waits_in: str) -> None:
    answers = {rank: doing(7, waits_in=waits_in) for rank in range(8)}
    answers[5] = doing(6, waits_in=waits_in)

    failure = stalled(answers)

    assert failure.rank == 5
    assert "rank 5 (pid 105 on 10.0.0.5) is behind: it is in backward of step 6" in failure.text


def test_progress_that_was_not_heard_of_yet_is_no_stall() -> None:
    heard = [WAITING.progress] * 8
    answers = dict.fromkeys(range(7), WAITING)
    assert not moved_on(answers, heard)
    assert moved_on({**answers, 2: doing(8)}, heard), "the controller itself was stopped, say"
