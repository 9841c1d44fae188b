"""The lines of ranks' logs as records: read, put in order over the ranks, and picked out.

Workers write JSON lines (``ringworld_workers.log_lines``). Lines of earlier versions are plain
text, with their time, level and logger in front; what else there is belongs to the line before.
"""

from __future__ import annotations

import heapq
import json
import re
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ringworld_platform import rank_logs
from ringworld_platform.run_folder import Page
from ringworld_platform.run_records import Record

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_PLAIN = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(?P<ms>\d{3}) "
    rf"(?P<level>{'|'.join(LEVELS)}) (?P<logger>[\w.]+): (?P<message>.*)"
)
_TAIL_BYTES = 64 << 10
CONTINUES = "continues"
"""Key of a record that goes on with the one before, such as a line of a trace."""


class LogView(Protocol):
    """Where logs can be asked for: every ``RunView``."""

    def logs(self, name: str, rank: int = 0, after: int = 0) -> Page:
        """Lines of one rank's log from ``after`` on."""

    def log_ends(self, name: str) -> dict[int, int]:
        """The ranks that have a log, and the place behind its last line."""


@dataclass(frozen=True, slots=True)
class FolderLogs:
    """The logs of one run folder, whatever the run's name."""

    folder: Path

    def logs(self, name: str, rank: int = 0, after: int = 0) -> Page:
        """See ``LogView``."""
        return Page(*rank_logs.read(self.folder, rank, after))

    def log_ends(self, name: str) -> dict[int, int]:
        """See ``LogView``."""
        return rank_logs.ends(self.folder)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines to show.

    Attributes:
        ranks: of these; empty means of all.
        level: of this and above, one of ``LEVELS``.
        stage: of this.
        attempt: of this.
        pattern: found in the message or the traceback.
    """

    ranks: frozenset[int] = frozenset()
    level: str = LEVELS[0]
    stage: str | None = None
    attempt: int | None = None
    pattern: re.Pattern[str] | None = None

    @property
    def everything(self) -> bool:
        """Whether every line of these ranks is wanted."""
        return self == Wanted(self.ranks)

    def __contains__(self, record: Record) -> bool:
        """Whether a line is wanted."""
        if self.everything:
            return True
        level = record.get("level", "INFO")
        if level in LEVELS and LEVELS.index(level) < LEVELS.index(self.level):
            return False
        if self.stage is not None and record.get("stage") != self.stage:
            return False
        if self.attempt is not None and record.get("attempt") != self.attempt:
            return False
        text = f"{record.get('message', '')}\n{record.get('traceback', '')}"
        return self.pattern is None or self.pattern.search(text) is not None


def parse(line: str, rank: int, before: Record | None = None) -> Record:
    """One line as a record.

    Args:
        line: as the log has it.
        rank: whose log.
        before: the record of the line before it; a line that is neither JSON nor begins with a
            time goes on with that.
    """
    if line.startswith("{"):
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "message" in found:
                return {**found, "rank": found.get("rank", rank)}
    if match := _PLAIN.fullmatch(line):
        seconds = time.mktime(time.strptime(match["time"], "%Y-%m-%d %H:%M:%S"))
        about = {"time": seconds + int(match["ms"]) / 1000, "level": match["level"], "rank": rank}
        return {**about, "logger": match["logger"], "message": match["message"]}
    inherited = {k: v for k, v in (before or {"rank": rank}).items() if k != "traceback"}
    return {**inherited, "message": line, CONTINUES: True}


def in_plain(record: Record) -> str:
    """A record as lines of text, for files that people open."""
    if record.get(CONTINUES):
        return str(record["message"])
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_time(record)))
    stage = f" {record['stage']}/{record.get('step', 0)}" if record.get("stage") else ""
    head = f"{when} {record.get('level', '')} rank {record.get('rank')}{stage}"
    text = f"{head} {record.get('logger', '')}: {record.get('message', '')}"
    return f"{text}\n{record['traceback']}" if record.get("traceback") else text


@dataclass(slots=True)
class LogReader:
    """Reads the logs of a run's ranks, from where it has come to.

    Attributes:
        view: where to ask.
        run_id: the run.
        wanted: which lines.
        read: lines so far, wanted or not.
    """

    view: LogView
    run_id: str
    wanted: Wanted
    read: int = 0
    _places: dict[int, int] = field(default_factory=dict)
    _before: dict[int, Record] = field(default_factory=dict)

    def ranks(self) -> list[int]:
        """Those that are wanted and have a log."""
        return [rank for rank in sorted(self.view.log_ends(self.run_id)) if self._wants(rank)]

    def tail(self, lines: int) -> list[Record]:
        """The last lines that are wanted, at most so many."""
        if not self.wanted.everything:
            return list(deque(self.new(), maxlen=lines))
        last: list[Record] = []
        for rank, end in self.view.log_ends(self.run_id).items():
            if self._wants(rank):
                last += self._last_of(rank, end, lines)
        last.sort(key=_time)
        return last[-lines:] if lines else []

    def new(self) -> Iterator[Record]:
        """What is new since the last time, by time; that of one rank stays in its order."""
        ends = self.view.log_ends(self.run_id)
        ranks = [r for r, end in ends.items() if self._wants(r) and end > self._places.get(r, 0)]
        return heapq.merge(*(self._new_of(rank) for rank in sorted(ranks)), key=_time)

    def _wants(self, rank: int) -> bool:
        return not self.wanted.ranks or rank in self.wanted.ranks

    def _new_of(self, rank: int) -> Iterator[Record]:
        while True:
            place = self._places.get(rank, 0)
            page = self.view.logs(self.run_id, rank=rank, after=place)
            if page.next == place:
                return
            self._places[rank] = page.next
            yield from self._records(rank, page.items)

    def _records(self, rank: int, lines: Iterable[str]) -> Iterator[Record]:
        for line in lines:
            self.read += 1
            record = self._before[rank] = parse(line, rank, self._before.get(rank))
            if record in self.wanted:
                yield record

    def _last_of(self, rank: int, end: int, lines: int) -> list[Record]:
        back = _TAIL_BYTES
        while True:
            start = max(0, end - back)
            found: list[str] = []
            place = start
            while (page := self.view.logs(self.run_id, rank=rank, after=place)).next != place:
                found += page.items
                place = page.next
            if start == 0 or len(found) > lines:
                break
            back *= 4
        self._places[rank] = place
        # What begins in the middle of a line is none.
        whole = found if start == 0 else found[1:]
        return list(self._records(rank, whole))[-lines:]


def level_named(name: str) -> str:
    """The level that is meant, in any case and cut off anywhere.

    Raises:
        ValueError: there is none; names those that there are.
    """
    asked = name.strip().upper()
    for level in LEVELS:
        if asked and level.startswith(asked):
            return level
    raise ValueError(f"there is no level {name}; there are {', '.join(LEVELS).lower()}")


def smart_pattern(text: str) -> re.Pattern[str]:
    """A regular expression; one that is all in lower case finds any case.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(text, re.IGNORECASE if text == text.lower() else 0)
    except re.error as error:
        raise ValueError(f"{text} is no regular expression: {error}") from None


def _time(record: Record) -> float:
    when = record.get("time")
    return float(when) if isinstance(when, int | float) else 0.0


def ranks_named(names: Collection[str]) -> frozenset[int]:
    """Ranks as people write them: ``3``, ``0,2`` or ``4-7``.

    Raises:
        ValueError: what cannot be read so.
    """
    found: set[int] = set()
    for part in (part.strip() for name in names for part in name.split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"{part or 'nothing'} is no rank; write 3, or 0,2, or 4-7")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)
