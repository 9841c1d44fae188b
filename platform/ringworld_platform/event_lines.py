"""Events in the terminal: which of them, and how a line of them looks."""

from __future__ import annotations

import difflib
import re
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.text import Text

from ringworld_jobs.units import parse_seconds
from ringworld_platform.run_records import Record

TROUBLE, CARE, GOOD, NEWS = "red", "yellow", "green", "cyan"
KIND_STYLES = {
    **dict.fromkeys(
        ("error", "failure", "stall", "checkpoint_failed", "damaged_checkpoint"), TROUBLE
    ),
    **dict.fromkeys(("restart", "slow", "warning", "drain", "preempted", "rollback"), CARE),
    **dict.fromkeys(("loss_spike", "rows_left_out", "diverged", "moved", "store", "mesh"), CARE),
    **dict.fromkeys(("checkpoint", "parity", "evaluation"), GOOD),
    **dict.fromkeys(("stage", "state", "submitted"), NEWS),
}
TEXT_WIDTH = 24
"""A text that has less than this gets lines of its own."""
_COLUMNS = ("time", "stage", "step", "kind", "rank")
_RIGHT = frozenset({"step", "rank"})
_CLOCK = re.compile(r"\d{1,2}:\d\d(:\d\d)?")


@dataclass(frozen=True, slots=True)
class WantedEvents:
    """Which events to show.

    Attributes:
        kinds: of one of these; empty means of any.
        since: seconds since the epoch.
        stage: of this.
    """

    kinds: frozenset[str] = frozenset()
    since: float = 0.0
    stage: str | None = None

    def __contains__(self, event: Record) -> bool:
        """Whether an event is wanted."""
        if self.kinds and event.get("kind") not in self.kinds:
            return False
        if self.stage is not None and event.get("stage") != self.stage:
            return False
        return float(event.get("time") or 0) >= self.since


def kind_style(event: Record) -> str:
    """The colour of an event; that a run has failed is none of its state's."""
    if event.get("kind") == "state":
        return {"FAILED": TROUBLE, "RECOVERING": CARE, "SUCCEEDED": GOOD}.get(
            str(event.get("state")), NEWS
        )
    return KIND_STYLES.get(str(event.get("kind")), "default")


def since_when(text: str, now: float | None = None) -> float:
    """A time as people write it: ``10min``, ``2h`` (ago), ``14:30`` (the last one), or a date.

    Returns:
        Seconds since the epoch.

    Raises:
        ValueError: it is none of these.
    """
    moment = time.time() if now is None else now
    asked = re.sub(r"(?<=\d)m$", "min", text.strip())
    try:
        return moment - parse_seconds(asked)
    except ValueError:
        pass
    try:
        if _CLOCK.fullmatch(asked):
            today = datetime.fromtimestamp(moment)
            hour, minute, *second = map(int, asked.split(":"))
            found = today.replace(hour=hour, minute=minute, second=sum(second), microsecond=0)
            return found.timestamp() - (86_400 if found > today else 0)
        return datetime.fromisoformat(asked).timestamp()
    except ValueError:
        raise ValueError(
            f"{text} is no time; write 10min or 2h for so long ago, 14:30, or 2026-11-22T14:30"
        ) from None


def kinds_named(names: Sequence[str]) -> frozenset[str]:
    """Kinds as people write them: commas between them or not."""
    return frozenset(part.strip() for name in names for part in name.split(",") if part.strip())


def nothing_found(events: Sequence[Record], wanted: WantedEvents) -> str:
    """Why no event is shown, and what there is."""
    if not events:
        return "no events yet"
    kinds = Counter(str(event.get("kind")) for event in events)
    told = f"none of {len(events)} events matches; the kinds are "
    told += ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    near = [difflib.get_close_matches(kind, kinds, 1) for kind in wanted.kinds - set(kinds)]
    hints = sorted({match for matches in near for match in matches})
    if wanted.stage is not None:
        stages = dict.fromkeys(str(e["stage"]) for e in events if e.get("stage"))
        told += f"; the stages are {', '.join(stages)}" if stages else "; none has a stage"
    return told + (f"; did you mean {' or '.join(hints)}?" if hints else "")


class EventTable:
    """Lays out events in columns, as they come: each is as wide as it had to be so far."""

    def __init__(self, width: int | None = None) -> None:
        """Begin a table.

        Args:
            width: of the terminal, in characters; None puts each event into one line.
        """
        self._width = width
        self._sizes = [len(name) for name in _COLUMNS]

    def heading(self, events: Sequence[Record]) -> Text:
        """The columns' names, as wide as the first events need."""
        for event in events:
            self._grow(_cells(event))
        head = Text("  ".join([*self._padded(_COLUMNS), "text"]), style="dim")
        head.truncate(self._width or len(head))
        return head

    def row(self, event: Record) -> Text:
        """One event."""
        cells = _cells(event)
        self._grow(cells)
        padded = self._padded(cells)
        line = Text("  ".join(padded))
        start = sum(map(len, padded[:3])) + 6
        line.stylize("dim", 0, len(padded[0]))
        line.stylize(kind_style(event), start, start + len(padded[3]))
        text = str(event.get("text") or "")
        if self._width is None:
            return line.append("  " + " ".join(text.split()))
        room = self._width - len(line) - 2
        if room >= TEXT_WIDTH:
            return line.append("  " + _wrapped(text, len(line) + 2, room))
        return line.append("\n    " + _wrapped(text, 4, max(TEXT_WIDTH, self._width - 4)))

    def _grow(self, cells: Sequence[str]) -> None:
        pairs = zip(self._sizes, cells, strict=True)
        self._sizes = [max(size, len(cell)) for size, cell in pairs]

    def _padded(self, cells: Sequence[str]) -> list[str]:
        columns = zip(_COLUMNS, cells, self._sizes, strict=True)
        return [c.rjust(size) if n in _RIGHT else c.ljust(size) for n, c, size in columns]


def clock(when: float) -> str:
    """Day and time of day, in this machine's zone."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(when))


def _cells(event: Record) -> list[str]:
    said = [event.get(name) for name in ("stage", "step", "kind", "rank")]
    cells = ["-" if value is None or value == "" else str(value) for value in said]
    return [clock(float(event.get("time") or 0)), *cells]


def _wrapped(text: str, column: int, room: int) -> str:
    lines = textwrap.wrap(text, room, break_on_hyphens=False)
    return f"\n{' ' * column}".join(lines)
