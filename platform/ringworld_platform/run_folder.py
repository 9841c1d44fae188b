"""A run's folder: append-only logs that outlive every process of the run."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ringworld_platform import rank_logs
from ringworld_platform.errors import RunFolderError
from ringworld_platform.evaluation_records import EVALUATIONS_FOLDER, answers_files
from ringworld_platform.proofs import keep_proof
from ringworld_platform.rank_logs import LOGS_FOLDER
from ringworld_platform.run_records import EVENTS_FILE, METRICS_FILE, SPEC_FILE, Record, read_lines
from ringworld_workers.strict_json import finite

SAMPLES_FILE = "samples.jsonl"
PAGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a log.

    Attributes:
        items: records or lines, in order.
        next: what to pass as ``after`` to read on.
    """

    items: list[Any]
    next: int


class RunFolder:
    """Writes one run's logs. One object writes at a time; readers may come at any moment.

    Lines are handed to the system at once, so that they survive this process; they are not
    forced to the disk, so that a power cut may cost the last ones.
    """

    def __init__(self, path: Path) -> None:
        """Take the folder; ``open`` creates it."""
        self.path = path
        self._files: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()
        self._last_event = 0
        self._rotation = rank_logs.Rotation(path)

    def open(self, spec_yaml: str | None = None) -> None:
        """Create the folder and its spec, and mend what a crash left half-written.

        Args:
            spec_yaml: the resolved spec, where the folder may lack it; one that is there stays.

        Raises:
            RunFolderError: no permission, no space.
        """
        try:
            spec = self.path / SPEC_FILE
            if not spec.exists():
                # New: nobody else may look in, unless the owner lets them later.
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path.chmod(0o700)
            (self.path / LOGS_FOLDER).mkdir(parents=True, exist_ok=True)
            if spec_yaml is not None and not spec.exists():
                # Whole or not at all: a run goes on from this file after every crash.
                scratch = spec.with_suffix(".yaml.tmp")
                scratch.write_text(spec_yaml, encoding="utf-8")
                scratch.replace(spec)
            logs = [f"{LOGS_FOLDER}/{log.name}" for log in (self.path / LOGS_FOLDER).iterdir()]
            logs += answers_files(self.path)
            for name in (EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, *logs):
                _cut_torn_line(self.path / name)
        except OSError as error:
            raise self._unwritable(error) from error
        events = read_lines(self.path / EVENTS_FILE).records
        self._last_event = int(events[-1].get("seq", len(events))) if events else 0

    def append_event(self, kind: str, text: str, **more: Any) -> Record:
        """Add a line to the event log.

        Args:
            kind: what sort of event, such as ``state``.
            text: one line for people.
            **more: what belongs to it.
        """
        with self._lock:
            self._last_event += 1
            event = {"seq": self._last_event, "time": time.time(), "kind": kind, "text": text}
            event.update(more)
            self._append(EVENTS_FILE, _line(event))
        return event

    def append_metrics(self, records: Sequence[Record]) -> None:
        """Add lines to the metric log.

        A step's ``sample_ids`` go to the log of samples instead, and the ``report`` of a proof of
        parity to its own file. A figure that is no finite number is null, here as in all logs.
        """
        lines, samples = [], []
        for record in records:
            kept = dict(record)
            if kept.get("kind") == "parity" and (report := kept.pop("report", None)):
                self._keep_proof(report)
            ids = kept.pop("sample_ids", None)
            if ids is not None:
                about = {key: kept.get(key) for key in ("stage", "step", "attempt")}
                samples.append(_line({**about, "sample_ids": ids}))
            lines.append(_line(kept))
        with self._lock:
            # Samples first: a step that the metric log shows has its samples on record.
            if samples:
                self._append(SAMPLES_FILE, b"".join(samples))
            if lines:
                self._append(METRICS_FILE, b"".join(lines))

    def _keep_proof(self, report: Record) -> None:
        try:
            keep_proof(self.path, "preflight", report)
        except OSError as error:
            raise self._unwritable(error) from error

    def append_answers(self, name: str, records: Sequence[Record]) -> None:
        """Add lines to a log of answers.

        Args:
            name: of the log, see ``evaluation_records.answers_file``.
            records: answers, or figures made of them.
        """
        with self._lock:
            try:
                (self.path / EVALUATIONS_FOLDER).mkdir(exist_ok=True)
            except OSError as error:
                raise self._unwritable(error) from error
            self._append(name, b"".join(_line(record) for record in records))

    def append_log(self, rank: int, lines: Sequence[str]) -> None:
        """Add lines to one rank's log, whose oldest pieces go as it grows: see ``rank_logs``."""
        if not lines:
            return
        text = "".join(line.rstrip("\n") + "\n" for line in lines)
        data = text.encode("utf-8", "replace")
        with self._lock:
            name, full = self._rotation.piece_for(rank, len(data))
            if full is not None and (file := self._files.pop(full, None)) is not None:
                file.close()
            self._append(name, data)

    def events(self, after: int = 0) -> list[Record]:
        """Events whose number is above ``after``."""
        events = read_lines(self.path / EVENTS_FILE).records
        return [event for event in events if int(event.get("seq", 0)) > after]

    def metrics(self, after: int = 0) -> Page:
        """Metric records from byte ``after`` on, about a mebibyte of them."""
        lines = read_lines(self.path / METRICS_FILE, after, PAGE_BYTES)
        return Page(lines.records, lines.offset)

    def log(self, rank: int, after: int = 0) -> Page:
        """Lines of a rank's log from place ``after`` on, about a mebibyte of them."""
        return Page(*rank_logs.read(self.path, rank, after))

    def log_ends(self) -> dict[int, int]:
        """The ranks that have a log, and the place behind its last line."""
        return rank_logs.ends(self.path)

    def close(self) -> None:
        """Close the files; a later append opens them again."""
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def _append(self, name: str, data: bytes) -> None:
        try:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = (self.path / name).open("ab", buffering=0)
            size = os.fstat(file.fileno()).st_size
            try:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            except OSError:
                # A full disk takes a part: what is written next must not be glued to it.
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"cannot write the run folder {self.path}: {error.strerror or error}; "
            "free space or fix its permissions, then resume the run"
        )


def _line(record: Record) -> bytes:
    try:
        text = json.dumps(record, separators=(",", ":"), default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(record), separators=(",", ":"), default=str, allow_nan=False)
    return text.encode() + b"\n"


def _cut_torn_line(path: Path) -> None:
    """End the file after its last complete line: a crash may have cut the one after it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 4096)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)
