"""A rank's outbox: records are numbered, and kept until the reader says that it has them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

from ringworld_workers.log_lines import Flood, LineFormatter, Redaction, log_line
from ringworld_workers.reporter import Record, RingPlace

EntryKind = Literal["metrics", "answer", "event", "log"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a rank has said.

    Attributes:
        seq: its number in this worker's outbox, from 1.
        kind: which log it belongs to.
        data: the record, or the line of text of a ``log`` entry.
    """

    seq: int
    kind: EntryKind
    data: Any


@dataclass(frozen=True, slots=True)
class Progress:
    """A rank's heartbeat.

    Attributes:
        phase: what it is doing, such as ``forward``.
        step: in which step of the stage.
        since: wall-clock time (seconds since the epoch, this worker's clock) at which it began.
        count: how many phases and ring hops it has begun; a number that stands still means no
            progress.
        hop: exchanges of the ring's present round that are behind it; 0 outside of attention.
        awaits: the rank whose keys and values it waits for at this moment, if it does.
        memory_bytes: of its device, or of its process where it computes on the CPU.
    """

    phase: str = "start"
    step: int = 0
    since: float = 0.0
    count: int = 0
    hop: int = 0
    awaits: int | None = None
    memory_bytes: int | None = None


class Recorder:
    """A ``Reporter`` whose records wait to be fetched. Any thread may call any method."""

    def __init__(self) -> None:
        """Start with an empty outbox."""
        self._lock = threading.Lock()
        self._entries: deque[Entry] = deque()
        self._last_seq = self._stored_seq = self._awaited_seq = 0
        self._stop = threading.Event()
        self._progress = Progress(since=time.time())
        self._ring: RingPlace | None = None
        self._hops_before = 0

    def phase(self, name: str, step: int, ring: RingPlace | None = None) -> None:
        """See ``Reporter.phase``."""
        with self._lock:
            count = self._counted() + 1
            self._progress = Progress(phase=name, step=step, since=time.time(), count=count)
            self._ring, self._hops_before = ring, ring.hops if ring is not None else 0

    def metrics(self, record: Record) -> None:
        """See ``Reporter.metrics``."""
        self._add("metrics", dict(record))

    def answer(self, record: Record) -> None:
        """See ``Reporter.answer``."""
        self._add("answer", dict(record))

    def event(self, record: Record) -> None:
        """See ``Reporter.event``."""
        self._add("event", {"time": time.time(), **record})

    def log_line(self, text: str) -> None:
        """Keep a line of this rank's log."""
        self._add("log", text)

    def should_stop(self) -> bool:
        """See ``Reporter.should_stop``."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Make ``should_stop`` true from now on."""
        self._stop.set()

    def position(self) -> int:
        """See ``Reporter.position``."""
        with self._lock:
            return self._last_seq

    def stored(self, position: int) -> bool:
        """See ``Reporter.stored``: the reader has asked for what comes after."""
        with self._lock:
            self._awaited_seq = max(self._awaited_seq, position)
            return self._stored_seq >= position

    def awaited(self) -> bool:
        """Whether somebody has asked if records are stored that are not yet."""
        with self._lock:
            return self._awaited_seq > self._stored_seq

    def progress(self) -> Progress:
        """The newest heartbeat."""
        with self._lock:
            if self._ring is None:
                return self._progress
            hop, awaits = self._ring.hop, self._ring.awaits
            return replace(self._progress, count=self._counted(), hop=hop, awaits=awaits)

    def _counted(self) -> int:
        hops = self._ring.hops - self._hops_before if self._ring is not None else 0
        return self._progress.count + max(0, hops)

    def drain(self, after_seq: int) -> list[Entry]:
        """Everything after entry ``after_seq``; what came before it is forgotten.

        Asking again with the same number gives the same entries again: a lost reply loses nothing.
        """
        with self._lock:
            self._stored_seq = max(self._stored_seq, after_seq)
            while self._entries and self._entries[0].seq <= after_seq:
                self._entries.popleft()
            return list(self._entries)

    def _add(self, kind: EntryKind, data: Any) -> None:
        with self._lock:
            self._last_seq += 1
            self._entries.append(Entry(self._last_seq, kind, data))


class RecorderHandler(logging.Handler):
    """Sends a worker's Python log lines to its outbox, see ``log_lines``."""

    def __init__(self, recorder: Recorder, redact: Redaction) -> None:
        """Send to ``recorder``, without secrets."""
        super().__init__()
        self._recorder = recorder
        self._place: dict[str, Any] = {}
        self._flood, self._warnings = Flood(), Flood()
        self.setFormatter(LineFormatter(self._about, redact))

    def place(self, *, rank: int, stage: str, attempt: int, node: str) -> None:
        """Say from now on where in the run this worker is."""
        self._place = {"rank": rank, "stage": stage, "attempt": attempt, "node": node}

    def emit(self, record: logging.LogRecord) -> None:
        """Format one line and keep it."""
        try:
            # Apart: chatter must not push out what tells of trouble.
            flood = self._warnings if record.levelno >= logging.WARNING else self._flood
            if not flood.passes():
                return
            if flood.left_out:
                text = f"{flood.left_out} lines left out: too many at once"
                flood.left_out = 0
                name = __name__
                line = log_line(record.created, "WARNING", name, text, **self._about())
                self._recorder.log_line(line)
            self._recorder.log_line(self.format(record))
        except Exception:
            self.handleError(record)

    def _about(self) -> dict[str, Any]:
        return {**self._place, "step": self._recorder.progress().step}
