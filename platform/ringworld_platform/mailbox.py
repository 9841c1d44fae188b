"""Replies to calls of workers, as they come.

Ray tells of each by a callback, so that a thread that waits for a gang costs nothing while nothing
comes. ``ray.wait`` goes through all that is awaited each time that it is called.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

Reply = Future[Any]
"""What has come: ``result`` gives it at once, or raises as ``ray.get`` does."""


class Mailbox:
    """Where replies arrive. One thread takes them."""

    def __init__(self) -> None:
        """Nothing is awaited yet."""
        self._arrived: queue.SimpleQueue[tuple[Any, Reply]] = queue.SimpleQueue()

    def expect(self, call: Any) -> None:
        """Take in the reply to a call, or its error, once it is there.

        Args:
            call: what the call of a worker's method gave.
        """
        call.future().add_done_callback(lambda reply: self._arrived.put((call, reply)))

    def take(self, timeout_seconds: float) -> Iterator[tuple[Any, Reply]]:
        """The calls whose replies have come, in their order; waits for the first.

        Args:
            timeout_seconds: longest wait.
        """
        wait = max(0.0, timeout_seconds)
        while True:
            try:
                yield self._arrived.get(timeout=wait)
            except queue.Empty:
                return
            wait = 0.0
