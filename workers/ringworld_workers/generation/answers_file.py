"""Answers appended to a jsonl file as they come; a rerun goes on where the file ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringworld_workers.generation.source import RequestError

SETTINGS_SUFFIX = ".settings.json"


class AnswersFile:
    """Answers of one set of settings, each a JSON line that is on disk when ``add`` returns.

    Beside it lies what they were made with, so that no file mixes two settings.

    Attributes:
        done: digest of the question by its id, of those that have an answer.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open for going on; a line that a kill cut off is removed.

        Args:
            path: created where it is not there.
            settings: plain data: the model and how it is asked.

        Raises:
            RequestError: it holds answers of other settings, or what is no answer of ours.
        """
        self.path = path
        self.done: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._check(dict(settings))
            self._file = path.open("ab")
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}") from error

    def add(self, record: Mapping[str, Any]) -> None:
        """Append an answer: ``id``, ``digest`` of its question, and more."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[str(record["id"])] = str(record["digest"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check(self, settings: dict[str, Any]) -> None:
        beside = self.path.with_name(self.path.name + SETTINGS_SUFFIX)
        held = self._read(ours=beside.exists())
        if held:
            try:
                before = json.loads(beside.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise RequestError(
                    f"{self.path} holds {held:,} lines, and {beside.name}, which would say how "
                    "they were made, is not beside it; name another --out"
                ) from None
            plain = json.loads(json.dumps(settings))
            other = [key for key in {**before, **plain} if before.get(key) != plain.get(key)]
            if other:
                shown = "; ".join(
                    f"{k} was {before.get(k)!r} and is {plain.get(k)!r}" for k in other
                )
                raise RequestError(
                    f"{self.path} holds {held:,} answers of other settings: {shown}. Take those "
                    "again, or name another --out"
                )
            return
        temporary = beside.with_name(f".{beside.name}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        temporary.replace(beside)

    def _read(self, *, ours: bool) -> int:
        """Take in what is there; returns the number of whole lines."""
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        # A file that somebody else wrote may end without a newline: nothing is cut off that.
        whole = data[: data.rfind(b"\n") + 1] if ours else data
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.done[str(record["id"])] = str(record["digest"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise RequestError(
                    f"{self.path} line {number} is no answer of `ringworld generate`; name "
                    "another --out"
                ) from None
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return len(whole.splitlines())
