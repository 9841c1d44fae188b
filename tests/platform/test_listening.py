"""How workers are listened to: no record lost or doubled, and no more questions than agreed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import RayActorError

from ringworld_platform.mailbox import Mailbox
from ringworld_platform.outboxes import Outboxes
from ringworld_platform.rhythm import (
    FIRST_RANKS_A_SECOND,
    MOST_SAVE_SECONDS,
    OTHER_RANKS_A_SECOND,
    SAVES_A_SECOND,
    Rhythm,
)
from ringworld_platform.run_state import LEASE_SECONDS
from ringworld_workers.actor import Drained
from ringworld_workers.recorder import Entry, Progress, Recorder

pytestmark = pytest.mark.timeout(60)


class Call:
    """The call of a worker's method, as Ray gives it: its reply comes when it comes."""

    def __init__(self) -> None:
        self.reply: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.reply


class Worker:
    """A worker's handle over a real recorder, without Ray between."""

    def __init__(self, *, answers: bool = True) -> None:
        self.recorder = Recorder()
        self.calls: list[Call] = []
        self._answers = answers

    @property
    def drain(self) -> Worker:
        return self

    def remote(self, after_seq: int) -> Call:
        self.calls.append(Call())
        if self._answers:
            self.calls[-1].reply.set_result(self.drained(after_seq))
        return self.calls[-1]

    def drained(self, after_seq: int) -> Drained:
        entries = self.recorder.drain(after_seq)
        return Drained(entries, self.recorder.progress(), self.recorder.awaited())


class Heard:
    """Who is told."""

    def __init__(self, rhythm: Rhythm) -> None:
        self.rhythm = rhythm
        self.expected_step_seconds: float | None = None
        self.lines: list[tuple[int, Any]] = []
        self.heartbeats = 0

    def entries(self, rank: int, entries: Sequence[Entry]) -> None:
        self.lines += [(rank, entry.data) for entry in entries]

    def progress(self, rank: int, progress: Progress) -> None:
        self.heartbeats += 1


def listen(outboxes: Outboxes, mailbox: Mailbox, seconds: float) -> None:
    """As the watch of a gang does."""
    end, looks = time.monotonic() + seconds, 0
    # A machine that stands still for a moment must not cost the looks themselves.
    while (left := end - time.monotonic()) > 0 or looks < 3:
        looks += 1
        outboxes.ask()
        for call, reply in mailbox.take(max(0.0, min(0.01, left))):
            outboxes.take(call, reply)


@pytest.mark.parametrize(("runs", "workers"), [(1, 1), (4, 64), (200, 1000), (500, 600)])
def test_a_controller_asks_and_saves_no_more_than_agreed(runs: int, workers: int) -> None:
    rhythm = Rhythm.of(runs, workers)

    assert runs / rhythm.first_rank <= FIRST_RANKS_A_SECOND + 1e-6
    assert (workers - runs) / rhythm.other_rank <= OTHER_RANKS_A_SECOND + 1e-6
    assert runs / rhythm.save <= max(SAVES_A_SECOND, runs / MOST_SAVE_SECONDS) + 1e-6
    assert rhythm.save < LEASE_SECONDS / 2, "an owner that is alive says so in time"


def test_a_small_controller_hears_of_every_rank_five_times_a_second() -> None:
    assert Rhythm.of(2, 8) == Rhythm(first_rank=0.2, other_rank=0.2, save=1.0, look=0.1)
    assert Rhythm.of(0, 0) == Rhythm()


def test_a_run_that_is_watched_is_heard_each_second_among_many() -> None:
    many = Rhythm.of(200, 1000)
    watched = many.watched()

    assert watched.first_rank <= 1.0 < many.first_rank
    assert watched.look <= 1.0
    assert (watched.save, watched.other_rank) == (many.save, many.other_rank)
    assert Rhythm.of(2, 8).watched() == Rhythm.of(2, 8)


def test_ranks_are_asked_in_their_rhythm_however_much_they_say() -> None:
    heard, mailbox = Heard(Rhythm(first_rank=0.1, other_rank=0.4)), Mailbox()
    workers = [Worker() for _ in range(5)]
    outboxes = Outboxes(heard, mailbox)
    outboxes.open(workers)
    for worker in workers:
        worker.recorder.log_line("hello")

    began = time.monotonic()
    for number in range(100):
        workers[0].recorder.metrics({"step": number})
        workers[1].recorder.phase("forward", number)
        listen(outboxes, mailbox, 0.01)
    seconds = time.monotonic() - began
    outboxes.drain(range(5), 5.0)

    assert len(workers[0].calls) <= seconds / 0.1 + 3
    assert all(len(worker.calls) <= seconds / 0.4 + 3 for worker in workers[1:])
    steps = [data["step"] for rank, data in heard.lines if rank == 0 and data != "hello"]
    assert steps == list(range(100)), "each once, in order"
    assert heard.heartbeats <= len(workers[1].calls)


def test_a_rank_that_waits_for_its_records_to_be_stored_is_asked_again_at_once() -> None:
    heard, mailbox, worker = Heard(Rhythm(first_rank=60.0)), Mailbox(), Worker()
    outboxes = Outboxes(heard, mailbox)
    outboxes.open([worker])
    worker.recorder.metrics({"kind": "checkpoint"})
    position = worker.recorder.position()
    assert not worker.recorder.stored(position)

    listen(outboxes, mailbox, 0.5)

    assert worker.recorder.stored(position)
    assert len(worker.calls) == 2


def test_a_lost_answer_loses_no_record_and_a_late_one_doubles_none() -> None:
    heard, mailbox, worker = Heard(Rhythm(first_rank=0.0)), Mailbox(), Worker(answers=False)
    outboxes = Outboxes(heard, mailbox)
    outboxes.open([worker])
    worker.recorder.log_line("one")
    late = worker.drained(0)

    outboxes.ask()
    outboxes.ask()
    assert len(worker.calls) == 1, "one question at a time"
    worker.calls[0].reply.set_exception(RayActorError())
    listen(outboxes, mailbox, 0.05)
    assert heard.lines == []
    outboxes.drain([0], 0.0)
    worker.calls[1].reply.set_result(late)
    listen(outboxes, mailbox, 0.05)
    outboxes.drain([0], 0.0)
    worker.calls[2].reply.set_result(late)
    listen(outboxes, mailbox, 0.05)
    mailbox.expect(worker.calls[2])
    listen(outboxes, mailbox, 0.05)

    assert heard.lines == [(0, "one")]


def test_a_rank_that_is_silent_keeps_back_nobodys_last_words() -> None:
    heard, mailbox = Heard(Rhythm(first_rank=60.0, other_rank=60.0)), Mailbox()
    workers = [Worker(), Worker(answers=False)]
    outboxes = Outboxes(heard, mailbox)
    outboxes.open(workers)
    listen(outboxes, mailbox, 0.05)
    workers[0].recorder.log_line("why it failed")

    outboxes.drain(range(2), 0.05)

    assert heard.lines == [(0, "why it failed")]
