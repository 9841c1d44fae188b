"""Single key presses from a terminal."""

from __future__ import annotations

import os
import select
import sys
import threading
from types import TracebackType
from typing import Any

# What terminals send for keys that are no character; in two dialects.
_NAMED = {
    **{f"\x1b{lead}A": "up" for lead in "[O"},
    **{f"\x1b{lead}B": "down" for lead in "[O"},
    **{f"\x1b{lead}C": "right" for lead in "[O"},
    **{f"\x1b{lead}D": "left" for lead in "[O"},
    **{f"\x1b{lead}H": "home" for lead in "[O"},
    **{f"\x1b{lead}F": "end" for lead in "[O"},
    "\x1b[5~": "pageup",
    "\x1b[6~": "pagedown",
    "\x1b[1~": "home",
    "\x1b[4~": "end",
    "\x1b[Z": "left",
    "\x1b": "escape",
}
_MOST_BYTES = 64


def decode_keys(data: str) -> list[str]:
    """The keys that a terminal has sent: characters, and names such as ``up`` and ``pagedown``.

    A sequence that is not known is no key.
    """
    keys = []
    while data:
        if data[0] != "\x1b" or data == "\x1b":
            keys.append(_NAMED.get(data[0], data[0]))
            data = data[1:]
            continue
        end = 2
        if data[1] in "[O":
            while end < len(data) and not "@" <= data[end] <= "~":
                end += 1
            end += 1
        if (name := _NAMED.get(data[:end])) is not None:
            keys.append(name)
        data = data[end:]
    return keys


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

    def pressed(self, timeout_seconds: float) -> list[str]:
        """The keys that were pressed, as ``decode_keys`` names them; none if none come in time."""
        if self._before is None:
            threading.Event().wait(timeout_seconds)
            return []
        ready, _, _ = select.select([sys.stdin], [], [], timeout_seconds)
        if not ready:
            return []
        # Past Python's buffer: what would wait in there, select does not see.
        data = os.read(sys.stdin.fileno(), _MOST_BYTES)
        return decode_keys(data.decode("utf-8", "ignore")) if data else ["q"]


def _in_foreground() -> bool:
    """Whether the terminal is this process's; a job in the background that sets it is stopped."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False  # no terminal, or no standard input at all
