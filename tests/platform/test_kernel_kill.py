"""What is said of a worker that the kernel may have killed for its memory."""

from __future__ import annotations

import pytest

from ringworld_platform.first_cause import Suspect, lost_worker
from ringworld_platform.kernel_kill import explain_loss
from ringworld_platform.recovery import FailureKind
from ringworld_workers.actor import Examined, Identity
from ringworld_workers.oom_kills import OomKills
from ringworld_workers.recorder import Progress
from ringworld_workers.stacks import Stacks

CUT_OFF = (
    "The actor died unexpectedly before finishing this task. Worker unexpectedly exits with a "
    "connection error code 2. Some common causes include: (1) the process was killed by the OOM "
    "killer due to high memory usage, (2) ray stop --force was called."
)
BEFORE = OomKills(3, 0, "/cg/memory.events")
WORKERS = [
    Identity(node, f"10.0.0.{node}", 40 + rank, (), "", BEFORE) for rank, node in enumerate("112")
]


def lost(rank: int, said: str = CUT_OFF) -> Suspect:
    return lost_worker(rank, f"pid {40 + rank}", RuntimeError(said))


def answer(counts: OomKills) -> Examined:
    return Examined(Progress("forward", 3, 0.0, 9), Stacks(""), counts)


def nobody(identity: Identity) -> OomKills:
    raise AssertionError(f"{identity.ip} is asked though a rank of it has answered")


def test_a_rank_of_the_same_node_says_that_the_kernel_killed() -> None:
    answers = {0: answer(OomKills(4, 1, "/cg/memory.events")), 2: answer(BEFORE)}
    cause = explain_loss(lost(1), WORKERS, answers, nobody)
    assert cause.failure.kind is FailureKind.OUT_OF_MEMORY
    assert cause.failure.text == (
        "rank 1 (pid 41 on 10.0.0.1) was probably killed by the kernel for memory: oom_kill of its "
        "cgroup on 10.0.0.1 rose from 0 to 1 since its gang began"
    )
    assert cause.failure.details == CUT_OFF
    # Of the whole machine there is a kill more, but none of this cgroup.
    answers[0] = answer(OomKills(4, 0, "/cg/memory.events"))
    suspect = lost(1)
    assert explain_loss(suspect, WORKERS, answers, nobody) is suspect


def test_a_node_without_another_rank_is_asked_itself() -> None:
    answers = {0: answer(OomKills(9, 9, "/cg/memory.events"))}
    asked: list[str] = []

    def ask(identity: Identity) -> OomKills:
        asked.append(identity.node)
        return OomKills(4)

    cause = explain_loss(lost(2), WORKERS, answers, ask)
    assert asked == ["2"]
    assert "for memory: oom_kill on 10.0.0.2 rose from 3 to 4 since" in cause.failure.text
    suspect = lost(2)
    assert explain_loss(suspect, WORKERS, answers, lambda _: OomKills()) is suspect, "in time"


@pytest.mark.parametrize(
    "said",
    [
        "The actor is dead because it was killed by `ray.kill`.",
        "The actor died because its node has died.",
        "Task was killed due to the node running low on memory.",
        "Worker exit type: INTENDED_SYSTEM_EXIT",
    ],
)
def test_an_end_that_is_explained_is_not_explained_again(said: str) -> None:
    suspect = lost(1, said)
    assert explain_loss(suspect, WORKERS, {}, nobody) is suspect


def test_who_has_told_no_counters_is_asked_for_none() -> None:
    suspect = lost(0)
    assert explain_loss(suspect, [], {}, nobody) is suspect, "not yet placed"
    assert explain_loss(suspect, [Identity("1", "10.0.0.1", 4, ())], {}, nobody) is suspect
