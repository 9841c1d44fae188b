"""One piece of work in a thread that gives way to training."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

Result = TypeVar("Result")

# Of a core that a training thread wants too, a thread of this niceness gets a tenth. Far less would
# be bad for training itself: a thread that is put off while it holds Python's lock holds it long.
NICENESS = 10


class Background(Generic[Result]):
    """Runs a function in a thread of its own; keeps what it returns or raises."""

    def __init__(self, name: str, function: Callable[[], Result], *, yields: bool = True) -> None:
        """Start at once.

        Args:
            name: of the thread.
            function: takes nothing; threads that it starts get its priority.
            yields: run at a lower priority than other threads, where the system can (Linux).
        """
        self._function = function
        self._yields = yields and sys.platform == "linux"
        self._result: Result | None = None
        self.error: Exception | None = None
        self.seconds = 0.0
        """How long it took, once it has ended."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for its end, at most so long."""
        self._thread.join(seconds)

    @property
    def result(self) -> Result:
        """What it has returned.

        Raises:
            Exception: what it has raised.
        """
        self.wait()
        if self.error is not None:
            raise self.error
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        if self._yields:
            with suppress(OSError):  # a thread of Linux has a priority of its own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        started = time.perf_counter()
        try:
            self._result = self._function()
        except Exception as error:  # whoever asks for the result gets it
            self.error = error
        self.seconds = time.perf_counter() - started
