"""The restart policy, and which of several failures is the first cause."""

from __future__ import annotations

import pytest

from ringworld_platform.first_cause import Suspect, first_cause, lost_worker, raised
from ringworld_platform.recovery import Failure, FailureKind, decide, kind_of
from ringworld_workers.actor import WorkerFailure

GUESSES = (
    "The actor died unexpectedly before finishing this task. Worker unexpectedly exits with a "
    "connection error code 2. Some common causes include: (1) the process was killed by the OOM "
    "killer due to high memory usage, (2) ray stop --force was called."
)


@pytest.mark.parametrize(
    ("kind", "restarts", "limit", "restart", "delay"),
    [
        (FailureKind.WORKER_LOST, 0, 5, True, 0.0),
        (FailureKind.STALL, 0, 5, True, 0.0),
        (FailureKind.ERROR, 1, 5, True, 1.0),
        (FailureKind.ERROR, 2, 5, True, 2.0),
        (FailureKind.ERROR, 4, 5, True, 8.0),
        (FailureKind.ERROR, 20, 99, True, 30.0),
        (FailureKind.ERROR, 5, 5, False, 0.0),
        (FailureKind.WORKER_LOST, 0, 0, False, 0.0),
        (FailureKind.USER_ERROR, 0, 5, False, 0.0),
    ],
)
def test_policy(kind: FailureKind, restarts: int, limit: int, restart: bool, delay: float) -> None:
    decision = decide(Failure(kind, "rank 0 fell"), restarts=restarts, max_restarts=limit)

    assert (decision.restart, decision.delay_seconds) == (restart, delay)
    assert decision.text.startswith("rank 0 fell")


def test_a_spent_budget_is_named() -> None:
    decision = decide(Failure(FailureKind.STALL, "stalled"), restarts=2, max_restarts=2)

    assert "2 restarts without a new checkpoint (recovery.max_restarts=2)" in decision.text


@pytest.mark.parametrize(
    ("types", "kind"),
    [
        (("DataError", "ValueError", "Exception"), FailureKind.USER_ERROR),
        (("JobSpecError", "Exception"), FailureKind.USER_ERROR),
        (("TrainingDiverged", "RuntimeError"), FailureKind.DIVERGED),
        (("OutOfMemoryError", "RuntimeError"), FailureKind.OUT_OF_MEMORY),
        (("MemoryError", "Exception"), FailureKind.OUT_OF_MEMORY),
        (("ParityFailed", "RuntimeError"), FailureKind.USER_ERROR),
        (("ModuleNotFoundError", "ImportError"), FailureKind.USER_ERROR),
        (("RuntimeError", "Exception"), FailureKind.ERROR),
        (("StoreError", "RuntimeError"), FailureKind.ERROR),
    ],
)
def test_which_exceptions_come_back(types: tuple[str, ...], kind: FailureKind) -> None:
    assert kind_of(types) is kind


def failed(rank: int, message: str, when: float, *types: str) -> Suspect:
    return raised(rank, WorkerFailure(types or ("RuntimeError",), message, "trace", when))


def test_an_echo_of_a_lost_peer_is_not_the_cause() -> None:
    echo = failed(0, "[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4", 1.0)
    lost = lost_worker(1, "pid 7 on 10.0.0.1", RuntimeError(GUESSES))

    found = first_cause([echo, lost]).failure

    assert (found.kind, found.rank) == (FailureKind.WORKER_LOST, 1)
    assert found.text == (
        "rank 1 (pid 7 on 10.0.0.1) was lost: its process ended without a Python error "
        "(killed, out of memory, or crashed)"
    )


def test_an_own_error_comes_before_lost_workers_and_later_errors() -> None:
    own = failed(2, "row 3 has\n no tokens", 5.0, "ValueError")
    later = failed(1, "CUDA error", 6.0)
    lost = lost_worker(0, "pid 7", RuntimeError(GUESSES))

    found = first_cause([later, lost, own]).failure

    assert found.text == "rank 2: ValueError: row 3 has no tokens"
    assert found.kind is FailureKind.USER_ERROR


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "1 worker(s) were killed due to the node running low on memory. Memory on the node "
            "(IP: 10.0.0.1, ID: ab) was 22.41GB used / 23.54GB limit (0.95)",
            "Ray killed it because its node ran out of memory (22.41 of 23.54 GB were in use)",
        ),
        ("Task was killed due to the node running low on memory.", "ran out of memory"),
        ("The actor died because its node has died.", "its node is gone"),
        ("died in its creation task:\nModuleNotFoundError: No module named 'x'", "could not start"),
    ],
)
def test_what_a_lost_worker_died_of(text: str, why: str) -> None:
    assert why in lost_worker(0, "pid 1", RuntimeError(text)).failure.text
