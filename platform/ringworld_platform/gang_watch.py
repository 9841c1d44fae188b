"""Waiting for the ranks of a gang: their replies, their records, and the first sign of trouble."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from ringworld_platform.evidence import Evidence, gather
from ringworld_platform.first_cause import Suspect, first_cause, lost_worker, raised
from ringworld_platform.inquiry import Inquiry, look_at_silent
from ringworld_platform.kernel_kill import explain_loss
from ringworld_platform.mailbox import Mailbox
from ringworld_platform.outboxes import Hearer, Outboxes
from ringworld_platform.pace import Limit, Pace
from ringworld_platform.recovery import Failure, FailureKind
from ringworld_platform.stall import diagnose, moved_on
from ringworld_workers.actor import Examined, Identity, WorkerFailure
from ringworld_workers.stacks import ProcessLook

GRACE_SECONDS = 0.3
ECHO_SECONDS = 3.0
ANSWER_SECONDS = 2.0
DRAIN_SECONDS = 2.0


class GangFailed(Exception):
    """The gang has ended before its work was done."""

    def __init__(
        self, failure: Failure, evidence: Evidence | None = None, when: float | None = None
    ) -> None:
        """Carry the first cause, what else is known, and when (monotonic; now) it was noticed."""
        super().__init__(failure.text)
        self.failure, self.evidence = failure, evidence
        self.when = time.monotonic() if when is None else when


class Listener(Hearer, Protocol):
    """Hears a gang while it works. Exceptions that it raises end the gang's work."""

    def tick(self) -> None:
        """Called several times a second."""

    def limit(self, seconds: float) -> None:
        """From now on, so long without progress is a failure."""


class GangWatch:
    """Watches the workers of one gang.

    Attributes:
        identities: where they live, by rank; empty until they are arranged.
    """

    def __init__(self, name: str, size: int, listener: Listener) -> None:
        """There are no workers yet.

        Args:
            name: of the gang.
            size: its workers.
            listener: hears what they say.
        """
        self._name, self._size, self._listener = name, size, listener
        self._actors: Sequence[Any] = []
        self.identities: Sequence[Identity] = []
        self._mailbox = Mailbox()
        self._outboxes = Outboxes(listener, self._mailbox)

    def open(self, actors: Sequence[Any], identities: Sequence[Identity]) -> None:
        """Take the workers, by rank, and listen to them from now on."""
        self._actors, self.identities = actors, identities
        self._outboxes.open(actors)

    def work(self, calls: Sequence[Any], pace: Pace, *, may_be_busy: bool = False) -> list[Any]:
        """Wait for the work of all ranks, and for the last that they have to say.

        Args:
            calls: one a rank.
            pace: says how long no heartbeat of any rank is a failure; learns from their steps.
            may_be_busy: a rank that answers at all has not stalled.

        Returns:
            The replies, in the order of ``calls``.

        Raises:
            GangFailed: the first failure of any rank.
        """
        self._outboxes.reset_clock()
        self._outboxes.pace = pace
        replies = self.wait(calls, pace=pace, may_be_busy=may_be_busy)
        self._outboxes.drain(range(len(calls)), DRAIN_SECONDS)
        return replies

    def wait(
        self,
        calls: Sequence[Any],
        timeout_seconds: float | None = None,
        *,
        pace: Pace | None = None,
        may_be_busy: bool = False,
    ) -> list[Any]:
        """Wait for one reply of each rank, fetching records meanwhile.

        Args:
            calls: one a rank.
            timeout_seconds: longest wait for all of them.
            pace: longest time without a heartbeat of any rank.
            may_be_busy: a rank that answers at all has not stalled.

        Returns:
            The replies, in the order of ``calls``.

        Raises:
            GangFailed: the first failure of any rank.
        """
        waiting = {call: rank for rank, call in enumerate(calls)}
        for call in calls:
            self._mailbox.expect(call)
        replies: list[Any] = [None] * len(calls)
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        look = 0.0
        while waiting:
            # Not after each reply: with many gangs these looks would cost more than the replies.
            if (now := time.monotonic()) >= look:
                self._listener.tick()
                look = now + self._listener.rhythm.look
                if pace is not None:
                    self._refuse_stall(pace, waiting.values(), may_be_busy)
            self._outboxes.ask()
            for call, reply in self._mailbox.take(look - now):
                rank = waiting.pop(call, None)
                if rank is None:
                    self._outboxes.take(call, reply)
                    continue
                found = self._reply(rank, reply.result)
                if isinstance(found, Suspect):
                    self._fail(found, waiting)
                replies[rank] = found
            if waiting and deadline is not None and time.monotonic() > deadline:
                ranks = ", ".join(str(rank) for rank in sorted(waiting.values()))
                text = f"rank {ranks} of {self._name} not ready after {timeout_seconds:g} s"
                failure = Failure(FailureKind.STALL, text, min(waiting.values()))
                raise GangFailed(failure, self._evidence(self._inquire().answers(ANSWER_SECONDS)))
        return replies

    def _reply(self, rank: int, result: Callable[[], Any]) -> Any:
        """A rank's reply, or what it is suspected of."""
        try:
            reply = result()
        except (RayActorError, OutOfMemoryError) as error:
            return lost_worker(rank, self._where(rank), error)
        except RayError as error:
            return raised(rank, WorkerFailure.of(error))
        return raised(rank, reply) if isinstance(reply, WorkerFailure) else reply

    def _where(self, rank: int) -> str:
        if rank >= len(self.identities):
            return "not yet placed"
        identity = self.identities[rank]
        return f"pid {identity.pid} on {identity.ip}"

    def _fail(self, first: Suspect, waiting: dict[Any, int]) -> None:
        """End the watch. The first error seen may be an echo: wait a moment for others.

        Raises:
            GangFailed: always.
        """
        suspects = [first]
        lost = {first.rank} if first.lost else set()
        inquiry = self._inquire(lost)
        began = time.monotonic()
        while waiting:
            # An echo alone tells of a rank whose own end is still to come, from its node or Ray.
            echoes = all(suspect.echo for suspect in suspects)
            left = began + (ECHO_SECONDS if echoes else GRACE_SECONDS) - time.monotonic()
            if left <= 0:
                break
            for ref in ray.wait(list(waiting), num_returns=1, timeout=left)[0]:
                rank = waiting.pop(ref)
                reply = self._reply(rank, partial(ray.get, ref))
                if isinstance(reply, Suspect):
                    suspects.append(reply)
                    if reply.lost:
                        lost.add(rank)
        self._outboxes.drain([r for r in range(self._size) if r not in lost], GRACE_SECONDS)
        answers = inquiry.answers(GRACE_SECONDS)
        cause = explain_loss(first_cause(suspects), self.identities, answers)
        failures = {suspect.rank: suspect.failure for suspect in (*suspects, cause)}
        evidence = self._evidence(answers, failures=failures)
        raise GangFailed(cause.failure, evidence, began)

    def _refuse_stall(self, pace: Pace, waiting: Collection[int], may_be_busy: bool) -> None:
        limit = pace.limit({self._outboxes.phase(rank) for rank in waiting})
        self._listener.limit(limit.seconds)
        if time.monotonic() - self._outboxes.progressed < limit.seconds:
            return
        answers = self._inquire().answers(ANSWER_SECONDS)
        silent = [rank for rank in sorted(waiting) if rank not in answers]
        busy = may_be_busy and not silent
        if busy or moved_on(answers, self._outboxes.heartbeats()):
            self._outboxes.reset_clock()
            return
        self._stalled(answers, silent, waiting, limit)

    def _stalled(
        self,
        answers: Mapping[int, Examined],
        silent: Sequence[int],
        waiting: Collection[int],
        limit: Limit,
    ) -> None:
        looks = look_at_silent(self.identities, silent)
        places = [self._where(rank) for rank in range(self._size)]
        failure = diagnose(answers, looks, places, waiting, limit)
        raise GangFailed(failure, self._evidence(answers, looks=looks))

    def _inquire(self, without: Collection[int] = ()) -> Inquiry:
        ranks = range(len(self._actors))
        return Inquiry(self._actors, [rank for rank in ranks if rank not in without])

    def _evidence(
        self,
        answers: Mapping[int, Examined],
        *,
        looks: Mapping[int, ProcessLook] | None = None,
        failures: Mapping[int, Failure] | None = None,
    ) -> Evidence:
        beats = self._outboxes.heartbeats()
        return gather(self._size, self.identities, beats, answers, looks or {}, failures or {})
