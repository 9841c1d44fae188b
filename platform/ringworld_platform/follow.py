"""Stay with a run in the foreground, and stop it in good order on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from ringworld_platform.display import Display
from ringworld_platform.errors import RunConflictError
from ringworld_platform.progress import RunProgress
from ringworld_platform.run_records import Record
from ringworld_platform.run_view import RunView

POLL_SECONDS = 0.5


class Controls(RunView, Protocol):
    """A view that can stop a run too."""

    def stop(self, name: str) -> str:
        """Ask for a stop at the next step's checkpoint."""


class StopRequests:
    """Counts Ctrl-C: the first asks for a stop, the second ends the wait at once."""

    def __init__(self) -> None:
        """No request so far."""
        self.asked = threading.Event()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Take a signal.

        Raises:
            KeyboardInterrupt: this is the second one.
        """
        if self.asked.is_set():
            raise KeyboardInterrupt
        self.asked.set()


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Take over Ctrl-C (and SIGTERM) while the block runs; needs the main thread."""
    requests = StopRequests()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, requests) for number in signals]
    try:
        yield requests
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def follow(
    controls: Controls, run_id: str, display: Display, *, poll_seconds: float = POLL_SECONDS
) -> Record:
    """Show a run until it ends.

    Args:
        controls: where to ask, and to stop.
        run_id: the run.
        display: shows it.
        poll_seconds: pause between two looks.

    Returns:
        The last status.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """
    progress = RunProgress(controls, run_id)
    told = False
    with stop_requests() as requests:
        while True:
            progress.poll()
            display.update(progress)
            if progress.ended:
                return progress.status
            if requests.asked.is_set() and not told:
                told = True
                _ask(controls, run_id, display)
            # Ctrl-C must be answered at once; after that there is nothing to wake up for.
            if told:
                threading.Event().wait(poll_seconds)
            else:
                requests.asked.wait(poll_seconds)


def _ask(controls: Controls, run_id: str, display: Display) -> None:
    display.note(
        "stopping: waiting for the current step and its checkpoint (Ctrl-C again ends at once)"
    )
    try:
        controls.stop(run_id)
    except RunConflictError:
        return  # it has just ended by itself; the next look says so
