"""Caption tables: rows of jsonl and csv files, in parts of a bounded number of rows.

What cannot be read is refused by file and line; the rest counts.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from ringworld_workers.data.draft import Refused, WorkItem
from ringworld_workers.data.files import InputFile

ROWS = 64
"""Rows of a part: a task decodes and encodes so many images or stretches."""
MAX_ROW_BYTES = 1 << 20
"""Longer lines are refused."""
_HEAD_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        line: number of the line that it starts in, from 1.
        values: by key or column.
    """

    line: int
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Found:
    """A row or a refusal, and the byte after it."""

    row: Row | Refused
    stop: int
    line: int
    """Number of the line after it."""


def table_items(dataset: str, tables: Sequence[InputFile]) -> list[WorkItem]:
    """The tables cut into parts of ``ROWS`` rows; an unreadable one is one part.

    Args:
        dataset: name of the dataset.
        tables: its tables, in order.
    """
    items: list[WorkItem] = []
    for table in tables:
        cuts: list[tuple[int, int]] = [(0, 1)]
        try:
            for number, found in enumerate(_scan(table, 0, 1), 1):
                if number % ROWS == 0:
                    cuts.append((found.stop, found.line))
        except OSError:
            cuts = cuts[:1]
        stops = [*(start for start, _ in cuts[1:]), None]
        for (start, first), stop in zip(cuts, stops, strict=True):
            items.append(WorkItem(dataset, len(items), table, start, stop, first))
    return items


def table_rows(item: WorkItem) -> Iterator[Row | Refused]:
    """The rows of a part, in order, streamed; blank lines are none."""
    try:
        for found in _scan(item.file, item.start, item.first):
            yield found.row
            if item.stop is not None and found.stop >= item.stop:
                return
    except OSError as error:
        yield Refused(item.file.label, f"cannot be read: {error.strerror}")


def _scan(table: InputFile, start: int, first: int) -> Iterator[_Found]:
    suffix = table.path.suffix.lower()
    with table.path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(start)
        if start == 0 and (why := _no_table(head, suffix)):
            yield _Found(Refused(table.label, why), len(head), 1)
        elif suffix == ".csv":
            yield from _csv_rows(table.label, file, start, first)
        else:
            yield from _jsonl_rows(table.label, file, first)


def _no_table(head: bytes, suffix: str) -> str | None:
    if suffix not in (".csv", ".jsonl", ".ndjson"):
        return "captions are read from .jsonl and .csv tables; rename or convert it"
    if not head.strip():
        return "the table is empty"
    if b"\0" in head:
        return "holds NUL bytes: no table, whatever its name says"
    return None


def _jsonl_rows(label: str, file: BinaryIO, line: int) -> Iterator[_Found]:
    for number, text in _lines(file, line):
        name = f"{label} line {number}"
        if isinstance(text, Refused):
            yield _Found(Refused(name, text.reason), file.tell(), number + 1)
        elif text.strip():
            yield _Found(_json(name, number, text), file.tell(), number + 1)


def _json(name: str, number: int, text: str) -> Row | Refused:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return Refused(name, f"not JSON: {error.msg} (column {error.colno})")
    except (RecursionError, ValueError) as error:
        return Refused(name, f"not JSON that can be read: {error}")
    if not isinstance(value, dict):
        return Refused(name, f"holds a JSON {type(value).__name__}, expected an object")
    return Row(number, value)


def _csv_rows(label: str, file: BinaryIO, start: int, first: int) -> Iterator[_Found]:
    # The columns stand in the first row, whatever part is read.
    file.seek(0)
    header = _Lines(file, 1)
    columns = next(csv.reader(header), [])
    if start:
        file.seek(start)
    lines = _Lines(file, first if start else header.line)
    reader = csv.reader(lines, strict=True)
    while True:
        line, lines.bad = lines.line, None
        name = f"{label} line {line}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            until = f" to {lines.line - 1}" if lines.line - 1 > line else ""
            yield _Found(Refused(f"{name}{until}", f"not CSV: {error}"), file.tell(), lines.line)
            continue
        if lines.bad is not None:
            row: Row | Refused = Refused(name, lines.bad)
        elif not values:
            continue
        elif len(values) != len(columns):
            row = Refused(name, f"{len(values)} values for {len(columns)} columns; quote commas")
        else:
            row = Row(line, dict(zip(columns, values, strict=True)))
        yield _Found(row, file.tell(), lines.line)


class _Lines:
    """Lines of a file as text for the csv module, which asks for as many as a row takes.

    Attributes:
        line: number of the next line.
        bad: why a line given out since this was cleared is no text; None: all were.
    """

    def __init__(self, file: BinaryIO, line: int) -> None:
        self.line = line
        self.bad: str | None = None
        self._lines = _lines(file, line)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, text = next(self._lines)
        self.line = number + 1
        if isinstance(text, Refused):
            self.bad = text.reason
            return "\n"
        return text


def _lines(file: BinaryIO, number: int) -> Iterator[tuple[int, str | Refused]]:
    """Lines with their numbers; one that is no text is a refusal without a name."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
            yield number, Refused("", f"longer than the limit of {MAX_ROW_BYTES:,} bytes")
        else:
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, Refused("", f"not UTF-8 text (byte {error.start} of the line)")
        number += 1
