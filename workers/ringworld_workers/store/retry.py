"""Trying again, within bounds: how long a store's call may take, and what ends it."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ringworld_workers.store.base import StoreError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """What a store's call may take before it fails.

    The last attempt of a call begins at the latest ``outage_seconds`` after it last went well, and
    it goes well only while bytes move at the floor rate: so what it may take is bounded by what it
    has to move.
    """

    outage_seconds: float = 120.0
    """Of failed attempts and pauses, until a call gives up."""
    attempts: int = 40
    """In a row that bring nothing, until a call gives up."""
    reply_seconds: float = 30.0
    """For a reply, or for the next bytes of one, until an attempt is given up."""
    completion_seconds: float = 90.0
    """The same for a reply that has to wait for all parts to be put together."""
    floor_bytes_per_second: float = 32768.0
    """An attempt that moves less over ``window_seconds`` is given up."""
    window_seconds: float = 15.0
    first_pause_seconds: float = 0.2
    longest_pause_seconds: float = 8.0


HASTE = Patience(outage_seconds=10.0, attempts=4, reply_seconds=5.0, completion_seconds=5.0)
"""For what somebody waits for, or what need not succeed."""


class Passing(Exception):
    """An attempt failed for a reason that may pass."""

    def __init__(self, reason: str, *, once: bool = False) -> None:
        """Say why.

        Args:
            reason: why, for the error that the caller gets in the end.
            once: a second time it is no passing fault.
        """
        super().__init__(reason)
        self.reason, self.once = reason, once


class Watch:
    """Notices that an attempt does not get on. Safe between threads."""

    def __init__(self, effort: Effort, reply_seconds: float | None = None) -> None:
        """Begin now; ``reply_seconds`` where not those of the effort's patience."""
        self._effort, self._patience = effort, effort.patience
        self._reply_seconds = reply_seconds or effort.patience.reply_seconds
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._began: float | None = None  # until the first bytes: connecting has its own limit
        self._bytes = 0
        self._given_up = False

    def moved(self, count: int, place: Callable[[], None] | None = None) -> None:
        """Note that bytes came or went; ``place`` puts them where the caller wants them.

        Raises:
            Passing: too few in the time, or the caller waits no longer: then ``place`` is not
                called, since its memory may be in use again.
        """
        with self._lock:
            if self._given_up:
                raise Passing("it was given up")
            if place is not None:
                place()
            now = time.monotonic()
            self._last = now
            if self._began is None:
                self._began = now
            self._bytes += count
            seconds = now - self._began
            if seconds < self._patience.window_seconds:
                return
            if self._bytes < self._patience.floor_bytes_per_second * seconds:
                raise Passing(f"only {self._bytes} bytes in {seconds:.0f} s")
            self._began, self._bytes = now, 0
            self._effort.went_well()

    def seconds_left(self) -> float:
        """Until the caller waits no longer."""
        return self._last + self._reply_seconds - time.monotonic()

    def give_up(self) -> None:
        """From now on nothing is put anywhere."""
        with self._lock:
            self._given_up = True


class Effort:
    """One call of a store, tried until it works or patience ends."""

    def __init__(self, operation: str, name: str, patience: Patience) -> None:
        """Begin now.

        Args:
            operation: what is tried, as in StoreError.
            name: on which object, as in StoreError.
            patience: its bounds.
        """
        self.operation, self.name, self.patience = operation, name, patience
        self.attempts = 0
        self.silence = "no reply in time"
        self._fruitless = 0
        self._warned = False
        self._since = time.monotonic()

    def went_well(self) -> None:
        """The time of failing begins anew."""
        self._since = time.monotonic()

    def gained(self) -> None:
        """Something was reached that no later attempt must do again."""
        self._fruitless = 0
        self.went_well()

    def run(self, attempt: Callable[[], Result]) -> Result:
        """Call ``attempt`` until it raises no Passing.

        Raises:
            StoreError: patience has ended; it gives the last attempt's reason.
        """
        while True:
            self.attempts += 1
            try:
                return attempt()
            except Passing as fault:
                self._pause(fault)

    def run_watched(
        self, attempt: Callable[[Watch], Result], reply_seconds: float | None = None
    ) -> Result:
        """The same in a thread per attempt, for what may hang without an end of its own.

        Name look-ups, credential helpers and replies that come in drips know no deadline. An
        attempt that does not get on is left behind; it moves no more bytes, and its thread ends
        with its connection.

        Args:
            attempt: gets the watch that it tells of each run of bytes.
            reply_seconds: for a reply, where not those of ``patience``.
        """
        return self.run(lambda: _in_thread(attempt, Watch(self, reply_seconds), self))

    def _pause(self, fault: Passing) -> None:
        """Wait, longer each time and never as long as others do.

        Raises:
            StoreError: there is no sense in going on.
        """
        self._fruitless += 1
        if fault.once and self._warned:
            raise self._failure(fault, transient=False)
        self._warned |= fault.once
        patience = self.patience
        longest = min(
            patience.first_pause_seconds * 2 ** (self._fruitless - 1),
            patience.longest_pause_seconds,
        )
        seconds = longest * random.uniform(0.5, 1.0)
        ends = self._since + patience.outage_seconds
        if self._fruitless >= patience.attempts or time.monotonic() + seconds >= ends:
            raise self._failure(fault, transient=True)
        log.info("%s %s: %s; attempt %d", self.operation, self.name, fault.reason, self.attempts)
        time.sleep(seconds)

    def _failure(self, fault: Passing, *, transient: bool) -> StoreError:
        return StoreError(
            self.operation, self.name, fault.reason, transient=transient, attempts=self.attempts
        )


def _in_thread(attempt: Callable[[Watch], Result], watch: Watch, effort: Effort) -> Result:
    done = threading.Event()
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(attempt(watch))
        except BaseException as error:  # whatever it is, it is raised where the caller waits
            errors.append(error)
        done.set()

    threading.Thread(target=run, name=f"store {effort.name}", daemon=True).start()
    try:
        while (left := watch.seconds_left()) > 0:
            if done.wait(left):
                break
        if not done.is_set():
            raise Passing(effort.silence)
    except BaseException:
        watch.give_up()
        raise
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # its frames hold this list, and would hold the caller's memory
    return results[0]
