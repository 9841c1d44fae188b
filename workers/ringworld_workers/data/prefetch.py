"""What the next steps need, made by a background thread while the step at hand computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

PREFETCHED_STEPS = 2
"""Steps that are ready before they are asked for."""
CLOSE_SECONDS = 5.0
"""How long closing waits for the step in the making; the thread dies with the process anyway."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class Prefetcher(Generic[Item]):
    """Makes one item after another ahead of time, in order; use it as a context manager.

    An exception comes out of ``take`` for the item that it belongs to, not before. Nothing depends
    on how far the thread is: a run that stops drops what was ready, and a resume makes it again.
    """

    def __init__(
        self, make: Callable[[int], Item], items: Sequence[int], ahead: int = PREFETCHED_STEPS
    ) -> None:
        """Start the thread.

        Args:
            make: gives an item; called from the thread alone.
            items: which ones, in order.
            ahead: items that wait at most.
        """
        self._items, self._make = iter(items), make
        self._ready: queue.Queue[Item | _Failed] = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="rows", daemon=True)
        self._thread.start()

    def _run(self, items: Sequence[int]) -> None:
        for item in items:
            if self._closed.is_set():
                return
            # close() empties the queue after it has set the flag, so no put blocks for ever.
            try:
                self._ready.put(self._make(item))
            except BaseException as error:
                self._ready.put(_Failed(error))
                return

    def take(self, item: int) -> Item:
        """The next item; waits until it is made.

        Raises:
            Exception: what making it raised.
            ValueError: it is not the next one.
        """
        if self._error is not None:
            raise self._error
        expected = next(self._items, None)
        if item != expected:
            raise ValueError(f"item {item} was asked for, and {expected} comes next")
        made = self._ready.get()
        if isinstance(made, _Failed):
            self._error = made.error
            raise made.error
        return made

    def close(self) -> None:
        """Stop the thread, and drop what is ready."""
        self._closed.set()
        deadline = CLOSE_SECONDS
        while self._thread.is_alive() and deadline > 0:
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                deadline -= 0.01

    def __enter__(self) -> Self:
        """Return the prefetcher."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()
