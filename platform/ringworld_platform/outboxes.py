"""Fetching what the ranks of a gang say: their records, in order and each once, and heartbeats."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from ray.exceptions import RayError

from ringworld_platform.mailbox import Mailbox, Reply
from ringworld_platform.pace import Pace
from ringworld_platform.rhythm import Rhythm
from ringworld_workers.actor import Drained
from ringworld_workers.recorder import Entry, Progress

AFTER_ERROR_SECONDS = 1.0


class Hearer(Protocol):
    """Who is told."""

    def entries(self, rank: int, entries: Sequence[Entry]) -> None:
        """New records of a rank, in order, each once."""

    def progress(self, rank: int, progress: Progress) -> None:
        """A rank's newest heartbeat."""

    @property
    def rhythm(self) -> Rhythm:
        """How often to ask."""

    @property
    def expected_step_seconds(self) -> float | None:
        """What a step is foretold to take, once that is known."""


class Outboxes:
    """The ranks' outboxes. At most one question a rank is open at a time, until the last.

    Attributes:
        progressed: when any rank last made progress (monotonic seconds).
        pace: learns from the steps that are told of, where one is given.
    """

    def __init__(self, hearer: Hearer, mailbox: Mailbox) -> None:
        """There are no ranks yet.

        Args:
            hearer: is told what they say.
            mailbox: takes in their answers, for whoever waits there to hand to ``take``.
        """
        self._hearer, self._mailbox = hearer, mailbox
        self._actors: list[Any] = []
        self._seqs: list[int] = []
        self._due: list[float] = []
        self._progress: list[Progress] = []
        self._questions: dict[Any, int] = {}
        self.progressed = time.monotonic()
        self.pace: Pace | None = None

    def open(self, actors: Sequence[Any]) -> None:
        """Take the workers, by rank."""
        self._actors = list(actors)
        self._seqs = [0] * len(self._actors)
        self._due = [0.0] * len(self._actors)
        self._progress = [Progress()] * len(self._actors)

    def reset_clock(self) -> None:
        """Count a lack of progress from now on."""
        self.progressed = time.monotonic()

    def phase(self, rank: int) -> str:
        """What a rank was last heard to do."""
        return self._progress[rank].phase

    def heartbeats(self) -> list[Progress]:
        """The last that was heard of each rank."""
        return list(self._progress)

    def ask(self) -> None:
        """Ask the ranks that are due."""
        now, rhythm = time.monotonic(), self._hearer.rhythm
        asked = set(self._questions.values())
        for rank, due in enumerate(self._due):
            if now >= due and rank not in asked:
                self._ask(rank)
                self._due[rank] = now + rhythm.rank(rank)

    def take(self, question: Any, reply: Reply) -> None:
        """Take an answer; a reply to anything else is left alone."""
        rank = self._questions.pop(question, None)
        if rank is None:
            return
        try:
            drained: Drained = reply.result()
        except RayError:
            # A lost worker fails its main call too, and that is what is judged.
            self._due[rank] = time.monotonic() + AFTER_ERROR_SECONDS
            return
        entries = [entry for entry in drained.entries if entry.seq > self._seqs[rank]]
        if entries:
            self._learn(entries)
            self._hearer.entries(rank, entries)
            expected = self._hearer.expected_step_seconds
            if self.pace is not None and expected is not None:
                self.pace.expect(expected)
            self._seqs[rank] = entries[-1].seq
        if drained.awaited:
            # Asked again at once: the rank waits to hear that its records are in the log.
            self._due[rank] = 0.0
        if drained.progress.count > self._progress[rank].count:
            self.progressed = time.monotonic()
            self._progress[rank] = drained.progress
            self._hearer.progress(rank, drained.progress)

    def _learn(self, entries: Sequence[Entry]) -> None:
        for entry in entries if self.pace is not None else ():
            if entry.kind == "metrics" and entry.data.get("kind") == "step":
                seconds = entry.data.get("step_seconds")
                if seconds is not None and self.pace is not None:
                    self.pace.step(seconds - entry.data.get("checkpoint_stall_seconds", 0.0))

    def drain(self, ranks: Collection[int], timeout_seconds: float) -> None:
        """Fetch what these ranks have said since the last question."""
        deadline = time.monotonic() + timeout_seconds
        # Whoever has an open question too: it may have been answered before the last records came.
        for rank in ranks:
            if rank < len(self._actors):
                self._ask(rank)
        while any(rank in ranks for rank in self._questions.values()):
            left = deadline - time.monotonic()
            # Too late is too late to wait, not to take what is there.
            for question, reply in self._mailbox.take(left):
                self.take(question, reply)
            if left <= 0:
                return

    def _ask(self, rank: int) -> None:
        question = self._actors[rank].drain.remote(self._seqs[rank])
        self._questions[question] = rank
        self._mailbox.expect(question)
