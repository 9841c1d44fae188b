"""Single key presses from a terminal."""

from __future__ import annotations

import os
import select
import sys
import threading
from types import TracebackType
from typing import Any


class Keys:
    """Reads keys without waiting for Enter; on anything but a terminal it only waits."""

    def __init__(self) -> None:
        """Change nothing yet."""
        self._before: list[Any] | None = None

    def __enter__(self) -> Keys:
        """Stop the terminal from gathering lines and from echoing."""
        if _in_foreground():
            import termios
            import tty

            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the terminal back as it was."""
        if self._before is not None and _in_foreground():
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def pressed(self, timeout_seconds: float) -> str | None:
        """The next key, or None when none comes in time."""
        if self._before is None:
            threading.Event().wait(timeout_seconds)
            return None
        ready, _, _ = select.select([sys.stdin], [], [], timeout_seconds)
        return sys.stdin.read(1) if ready else None


def _in_foreground() -> bool:
    """Whether the terminal is this process's; a job in the background that sets it is stopped."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False  # no terminal, or no standard input at all
