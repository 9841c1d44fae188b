"""A rank's log as JSON lines: who said it, where in the run, and what; no secrets, no floods.

One object a line: ``time`` (seconds since the epoch, this machine's clock), ``level``, ``logger``
and ``message``; of a worker also ``rank``, ``stage``, ``step``, ``attempt`` and ``node``, once it
has them; ``traceback`` where an exception was logged.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

MESSAGE_CHARACTERS = 8_000
TRACEBACK_CHARACTERS = 32_000
LINES_A_SECOND = 50.0
"""Of a rank, over a long time; more are left out and counted."""
BURST_LINES = 500
"""May come at once."""

_SECRET_WORDS = frozenset({"SECRET", "TOKEN", "PASSWORD", "PASSWD", "CREDENTIALS", "KEY"})
_NO_SECRET_ENDS = ("_FILE", "_PATH", "_DIR", "_URL", "_URI")
_LEAST_SECRET = 8
"""Characters: to take out a shorter value would riddle the log with holes."""
_KNOWN_SHAPES = (
    r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)",
    r"(?<=X-Amz-Signature=)[^&\s]+",
    r"(?<=X-Amz-Credential=)[^&\s]+",
    r"(?<=X-Amz-Security-Token=)[^&\s]+",
)
HIDDEN = "[secret]"


class Redaction:
    """Takes secrets out of text."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Learn the values to take out.

        Args:
            environment: variables; those that are named like a secret hold one. Passwords in urls
                and signatures of signed urls are taken out besides.
        """
        values = {value for name, value in environment.items() if _names_secret(name, value)}
        # The longest first: one may begin as another does.
        known = [re.escape(value) for value in sorted(values, key=len, reverse=True)]
        self._pattern = re.compile("|".join([*known, *_KNOWN_SHAPES]))

    def __call__(self, text: str) -> str:
        """The text without them."""
        return self._pattern.sub(HIDDEN, text)


def _names_secret(name: str, value: str) -> bool:
    upper = name.upper()
    if len(value) < _LEAST_SECRET or upper.endswith(_NO_SECRET_ENDS):
        return False
    return not _SECRET_WORDS.isdisjoint(upper.split("_"))


def log_line(
    when: float, level: str, logger: str, message: str, trace: str = "", **about: Any
) -> str:
    """One line, without its newline.

    Args:
        when: seconds since the epoch.
        level: such as ``WARNING``.
        logger: who says it.
        message: what; cut where it is very long.
        trace: of an exception; its end is kept where it is very long.
        **about: where in the run. What is None is left out.
    """
    line = {"time": round(when, 3), "level": level}
    line.update((name, value) for name, value in about.items() if value is not None)
    line["logger"] = logger
    line["message"] = _cut(message)
    if trace:
        left_out = len(trace) - TRACEBACK_CHARACTERS
        line["traceback"] = f"[...]\n{trace[left_out:]}" if left_out > 0 else trace
    # In ASCII: readers that know more ends of a line than one find no other.
    return json.dumps(line, separators=(",", ":"), default=str)


def _cut(message: str) -> str:
    left_out = len(message) - MESSAGE_CHARACTERS
    if left_out <= 0:
        return message
    return f"{message[:MESSAGE_CHARACTERS]} [{left_out} characters left out]"


class LineFormatter(logging.Formatter):
    """Makes ``log_line`` of Python's log records."""

    def __init__(self, about: Callable[[], Mapping[str, Any]], redact: Redaction) -> None:
        """Take what belongs to every line.

        Args:
            about: asked for each line: where in the run this process is.
            redact: takes secrets out.
        """
        super().__init__()
        self._about, self._redact = about, redact

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return log_line(
            record.created,
            record.levelname,
            record.name,
            self._redact(record.getMessage()),
            self._redact(trace) if trace else "",
            **self._about(),
        )


class PlainFormatter(logging.Formatter):
    """A line for people, without secrets: of Ray's own log files."""

    def __init__(self, redact: Redaction) -> None:
        """Take what removes secrets."""
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        return self._redact(super().format(record))


class Flood:
    """Lets ``BURST_LINES`` through at once and ``LINES_A_SECOND`` over time, and counts the rest.

    What waits to be fetched from a rank would otherwise fill its memory.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Let the first ones through."""
        self._clock = clock
        self._left, self._seen = float(BURST_LINES), clock()
        self.left_out = 0
        """Lines since the last that went through."""

    def passes(self) -> bool:
        """Whether the next line may go through. Not for several threads at once."""
        now = self._clock()
        self._left = min(float(BURST_LINES), self._left + (now - self._seen) * LINES_A_SECOND)
        self._seen = now
        if self._left < 1:
            self.left_out += 1
            return False
        self._left -= 1
        return True
