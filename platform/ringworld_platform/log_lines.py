"""Log records as lines of a terminal: in columns, each rank in its colour."""

from __future__ import annotations

import textwrap
from collections.abc import Collection

import click

from ringworld_platform.event_lines import clock
from ringworld_platform.log_records import CONTINUES
from ringworld_platform.run_records import Record

RANK_COLOURS = ("cyan", "magenta", "green", "blue", "bright_cyan", "bright_magenta")
"""Not those that tell of trouble."""
LEVEL_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
_SHORT = {"WARNING": "WARN", "CRITICAL": "FATAL"}
_LEVEL_WIDTH, _PLACE_WIDTH = 5, 8


class LogLines:
    """Lays out lines as they come."""

    def __init__(self, *, colour: bool) -> None:
        """Begin.

        Args:
            colour: mark ranks and levels with the terminal's colours.
        """
        self._colour = colour
        self._rank, self._place = 1, _PLACE_WIDTH

    def widen(self, ranks: Collection[int]) -> None:
        """Make room for the ranks that there are."""
        self._rank = max([self._rank, *(len(str(rank)) for rank in ranks)])

    def line(self, record: Record) -> str:
        """One record; its traceback in lines below."""
        if record.get(CONTINUES):
            return str(record["message"])
        stage = record.get("stage")
        place = f"{stage}/{record.get('step', 0)}" if stage else "-"
        self._place = max(self._place, len(place))
        level, rank = str(record.get("level", "")), int(record.get("rank", 0))
        message = f"{str(record.get('logger', '')).rpartition('.')[2]}: {record.get('message', '')}"
        parts = [
            self._paint(clock(float(record.get("time") or 0)), dim=True),
            self._paint(_SHORT.get(level, level).ljust(_LEVEL_WIDTH), LEVEL_COLOURS.get(level)),
            self._paint(f"r{rank}".rjust(self._rank + 1), RANK_COLOURS[rank % len(RANK_COLOURS)]),
            self._paint(place.ljust(self._place), dim=True),
            self._paint(message, LEVEL_COLOURS.get(level)),
        ]
        trace = record.get("traceback")
        below = f"\n{textwrap.indent(str(trace), '    ')}" if trace else ""
        return "  ".join(parts) + below

    def _paint(self, text: str, colour: str | None = None, *, dim: bool = False) -> str:
        if not self._colour or (colour is None and not dim):
            return text
        return click.style(text, fg=colour, dim=dim or None)
