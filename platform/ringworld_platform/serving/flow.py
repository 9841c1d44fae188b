"""One request's events on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from ringworld_platform.serving.api_errors import ApiError

if TYPE_CHECKING:
    from ringworld_model.sampling.answer import Event
    from ringworld_workers.generation.asks import Ask
    from ringworld_workers.serving import Engine


class ClientGone(Exception):
    """Who asked has closed the connection."""


class Flow:
    """What becomes of one request; use it on one event loop, and close it."""

    def __init__(self, engine: Engine, ask: Ask, gone: asyncio.Future[None]) -> None:
        """Submit a request.

        Args:
            engine: that answers.
            ask: what is asked.
            gone: done when the client has gone.

        Raises:
            ApiError: it is refused.
        """
        self._found: asyncio.Queue[list[Event] | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._engine, self._gone = engine, gone
        from ringworld_workers.serving import EngineClosed

        try:
            self._ticket = engine.submit(ask, self._deliver)
        except EngineClosed as error:
            raise ApiError(503, str(error), code="ring_lost", retry_after=5) from error
        except ValueError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from error
        self._ended = False
        gone.add_done_callback(self._tell_gone)

    async def events(self, beat_seconds: float | None = None) -> AsyncIterator[list[Event]]:
        """The events as they come; those that have come meanwhile are one list.

        Args:
            beat_seconds: an empty list comes after each such time without an event.

        Raises:
            ApiError: 500, the ring was lost, or could not draw.
            ClientGone: nobody listens any more.
        """
        from ringworld_model.sampling.draw import DrawError

        while not self._ended:
            try:
                async with asyncio.timeout(beat_seconds):
                    found = await self._found.get()
            except TimeoutError:
                yield []
                continue
            events: list[Event] = []
            while True:
                if isinstance(found, ClientGone):
                    raise found
                if isinstance(found, Exception):
                    self._ended = True
                    again = not isinstance(found, DrawError)
                    raise ApiError(
                        500, f"no answer: {found}", code="engine_error", again=again
                    ) from found
                events += found
                if self._found.empty():
                    break
                found = self._found.get_nowait()
            self._ended = bool(events) and events[-1].end is not None
            yield events

    def close(self) -> None:
        """Free what the request holds, wherever it is."""
        self._gone.remove_done_callback(self._tell_gone)
        if not self._ended:
            self._engine.cancel(self._ticket)

    def _deliver(self, found: list[Event] | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._found.put_nowait, found)
        except RuntimeError:
            pass  # the server has stopped, and its loop is closed

    def _tell_gone(self, _: object) -> None:
        self._found.put_nowait(ClientGone())
