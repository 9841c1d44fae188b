"""The engine: one thread that writes the answers to all requests on a ring, token by token.

Requests are admitted between two turns, in the order in which they came, as long as there is a row
and room in the cache for the longest answer that they may get. So an admitted one never runs out
of memory because of others, and none waits for a whole batch to end.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ringworld_model.sampling.answer import Event
from ringworld_model.sampling.draw import DrawError
from ringworld_workers.generation.asker import Asker
from ringworld_workers.generation.asks import Ask

log = logging.getLogger(__name__)

Deliver = Callable[[list[Event] | Exception], None]
"""Takes a turn's events of one request, or why there will be none; must return at once."""
_CLOSE_SECONDS = 10.0


class Ring(Protocol):
    """Ranks that answer; this process is the first. ``LocalRing`` is one."""

    @property
    def asker(self) -> Asker:
        """This process's part."""

    def call(self, method: str, *args: Any, **own: Any) -> Any:
        """Call a method of ``Asker`` on every rank; ``own`` arguments on this one alone."""

    def close(self) -> None:
        """End the other ranks."""


class EngineClosed(RuntimeError):
    """The engine answers no more; the message says why."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way.

    Attributes:
        number: of its events.
        ask: what is asked.
        tokens: of the cache that it may come to take.
        deliver: hears what becomes of it.
    """

    number: int
    ask: Ask
    tokens: int
    deliver: Deliver


class Engine:
    """Answers on one ring; ``submit``, ``cancel`` and ``fail`` may be called from any thread.

    Attributes:
        max_rows: requests that are answered at the same time.
        cache_tokens: tokens of all rows together, at most.
    """

    def __init__(self, ring: Ring, *, max_rows: int, cache_tokens: int) -> None:
        """Start the thread; from now on, nobody else may use the ring.

        Args:
            ring: its weights are loaded.
            max_rows: at least 1.
            cache_tokens: see ``cache_room``.
        """
        self.max_rows, self.cache_tokens = max_rows, cache_tokens
        self._ring = ring
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._gone: set[int] = set()
        self._next_number = 0
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Exception | None:
        """Why it answers no more; None: it does."""
        return self._failure

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._waiting)

    @property
    def held_tokens(self) -> int:
        """Tokens of the cache that the running requests may come to take."""
        return sum(ticket.tokens for ticket in list(self._running.values()))

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values on this rank."""
        return self._ring.asker.session.held_bytes

    def submit(self, ask: Ask, deliver: Deliver) -> Ticket:
        """Take a request.

        Args:
            ask: that fits the context; its settings bound the answer.
            deliver: called from the engine's thread; the last call has an event with an ``end``, or
                an exception: ``EngineClosed``, ``DrawError`` or why it cannot be admitted.

        Raises:
            EngineClosed: it answers no more.
            ValueError: the request alone is more than the cache may hold.
        """
        session = self._ring.asker.session
        answer = ask.settings.max_new_tokens
        most = session.max_length if answer is None else len(ask.prompt) + answer
        tokens = min(most, session.max_length)
        if tokens > self.cache_tokens:
            raise ValueError(
                f"the prompt's {len(ask.prompt):,} tokens and the answer's may come to "
                f"{tokens:,}, and the cache has room for {self.cache_tokens:,}; shorten the "
                "prompt, or ask for fewer tokens"
            )
        with self._changed:
            self._refuse_ended()
            ticket = Ticket(self._next_number, ask, tokens, deliver)
            self._next_number += 1
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Free what a request holds, as its asker is gone; nothing more need be delivered."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif ticket.number in self._running:
                self._gone.add(ticket.number)
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """End all requests, and take no more: the ring is lost.

        For who watches the ranks: the engine's own thread may be waiting for a lost one.
        """
        with self._changed:
            if self._failure is None:
                self._failure = error
                if not self._closing:
                    log.error("the engine has ended: %s", error)
            tickets = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in tickets:
            ticket.deliver(EngineClosed(str(self._failure)))

    def close(self) -> None:
        """End all requests, the thread and the ring."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.fail(EngineClosed("the server is being stopped"))
        self._thread.join(_CLOSE_SECONDS)
        self._ring.close()

    def _refuse_ended(self) -> None:
        if self._failure is not None:
            raise EngineClosed(str(self._failure))

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._failure is not None or self._running or self._fits()
                    )
                    if self._failure is not None:
                        return
                    newcomers = self._take()
                if newcomers:
                    self._admit(newcomers)
                if self._running:
                    self._write()
        # Whatever it was: a request that is never answered is worse than any error.
        except Exception as error:
            self.fail(error)

    def _fits(self) -> bool:
        """Whether the next in line can be admitted now."""
        if not self._waiting or len(self._running) >= self.max_rows:
            return False
        return self.held_tokens + self._waiting[0].tokens <= self.cache_tokens

    def _take(self) -> list[Ticket]:
        taken = []
        while self._fits():
            ticket = self._waiting.popleft()
            self._running[ticket.number] = ticket
            taken.append(ticket)
        return taken

    def _admit(self, tickets: list[Ticket]) -> None:
        """Have the ring take requests; it refuses all or none, so they are asked one by one."""
        for ticket in tickets:
            try:
                self._ring.call("admit", [ticket.number], [ticket.ask])
            except ValueError as error:
                self._end([ticket], error)

    def _write(self) -> None:
        try:
            for events in self._ring.call("turns", cancelled=self._cancelled, pause=self._pause):
                self._deliver(events)
        except ValueError as error:
            # Raised on every rank alike, which go on; but these rows are in no known state.
            log.exception("a turn failed")
            self._ring.call("clear")
            self._end(list(self._running.values()), error)

    def _cancelled(self) -> set[int]:
        with self._changed:
            if self._failure is not None:
                # They are forgotten here, and the ring's ranks must come to an end alike.
                return set(range(self._next_number))
            gone, self._gone = self._gone, set()
            return gone

    def _pause(self) -> bool:
        with self._changed:
            return self._failure is not None or self._fits()

    def _deliver(self, events: Iterable[Event]) -> None:
        by_number: dict[int, list[Event]] = {}
        for event in events:
            by_number.setdefault(event.prompt, []).append(event)
        for number, its in by_number.items():
            with self._changed:
                ended = its[-1].end is not None
                ticket = self._running.pop(number, None) if ended else self._running.get(number)
            if ticket is None:
                continue
            if its[-1].end == "failed":
                log.error("request %d has no next token: %s", number, its[-1].problem)
                ticket.deliver(DrawError(its[-1].problem))
            else:
                ticket.deliver(its)

    def _end(self, tickets: Iterable[Ticket], error: Exception) -> None:
        for ticket in tickets:
            with self._changed:
                known = self._running.pop(ticket.number, None)
            if known is not None:
                ticket.deliver(error)
