"""Text files of every format as documents, in parts of bounded size.

A part that cannot be read, or a line or row in it, is refused by name and number; the rest counts.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pyarrow import parquet

from ringworld_workers.data.draft import Refused, WorkItem
from ringworld_workers.data.files import InputFile
from ringworld_workers.data.json_lines import json_lines, kind

Format = Literal["txt", "jsonl", "parquet", "hf"]
PART_BYTES = 16 << 20
"""A large file is read in parts of about so many bytes, each by whichever worker is free."""
MAX_DOCUMENT_BYTES = 64 << 20
"""Longer documents are refused: a worker holds a whole document and its tokens in memory."""

_HEAD_BYTES = 8192
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "hf",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its file and the place in it, and its text."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a jsonl, row groups of a parquet, record batches of an hf file.

    Attributes:
        start: the first.
        stop: one past the last; None: to the end.
        first: number of its first line or row, from 1.
    """

    start: int = 0
    stop: int | None = None
    first: int = 1


WHOLE = (Part(),)


def format_of(file: InputFile) -> Format:
    """What the file's suffix says; txt where it says nothing."""
    return _SUFFIXES.get(file.path.suffix.lower(), "txt")


def parts(file: InputFile, kind: Format, part_bytes: int = PART_BYTES) -> Sequence[Part]:
    """The parts of a file; one for a small file, and for one that turns out to be unreadable."""
    try:
        if kind == "txt" or file.path.stat().st_size <= part_bytes:
            return WHOLE
        if kind == "jsonl":
            return _line_parts(file, part_bytes)
        if kind == "parquet":
            return _row_group_parts(file, part_bytes)
        return _record_batch_parts(file, part_bytes)
    except (OSError, pa.ArrowException):
        return WHOLE


def documents(item: WorkItem, kind: Format, field: str) -> Iterator[Document | Refused]:
    """The documents of an item in order, streamed.

    Args:
        item: a file or one of its ``parts``.
        kind: its format.
        field: key or column of the text; txt has none.
    """
    try:
        if kind == "txt":
            yield _whole_text(item.file)
        elif kind == "jsonl":
            yield from _lines(item, field)
        elif kind == "parquet":
            yield from _parquet_rows(item, field)
        else:
            yield from _arrow_rows(item, field)
    except OSError as error:
        yield Refused(item.file.label, f"cannot be read: {error.strerror or error}")


# --- txt ---


def _whole_text(file: InputFile) -> Document | Refused:
    size = file.path.stat().st_size
    if size == 0:
        return Refused(file.label, "the file is empty")
    if size > MAX_DOCUMENT_BYTES:
        return Refused(file.label, _too_long(size))
    content = file.path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return Refused(file.label, "UTF-16 text, expected UTF-8; convert it")
    if b"\0" in content[:_HEAD_BYTES]:
        return Refused(file.label, "holds NUL bytes: no text file, whatever its name says")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Refused(file.label, f"not UTF-8 text (byte {error.start})")
    if not text.strip():
        return Refused(file.label, "the file holds nothing but white space")
    return Document(file.label, text.replace("\r\n", "\n").replace("\r", "\n"))


def _too_long(size: int) -> str:
    return (
        f"a document of {size:,} bytes; the limit is {MAX_DOCUMENT_BYTES:,}. Cut it, for instance "
        f"into the lines of a .jsonl"
    )


# --- jsonl ---


def _line_parts(file: InputFile, part_bytes: int) -> Sequence[Part]:
    """Byte ranges; a line belongs to the range that it starts in."""
    found: list[Part] = []
    line, place = 1, 0
    with file.path.open("rb") as stream:
        while chunk := stream.read(part_bytes):
            found.append(Part(place, place + len(chunk), line))
            place += len(chunk)
            line += chunk.count(b"\n")
    return found


def _lines(item: WorkItem, field: str) -> Iterator[Document | Refused]:
    for line in json_lines(item, MAX_DOCUMENT_BYTES):
        if isinstance(line, Refused):
            yield line
        elif field not in line.value:
            keys = ", ".join(list(line.value)[:8]) or "none"
            yield Refused(line.name, f"no key {field!r} (its keys: {keys}); correct text_field")
        else:
            yield _checked(line.name, field, line.value[field])


def _checked(name: str, field: str, value: Any) -> Document | Refused:
    if not isinstance(value, str):
        return Refused(name, f"{field!r} holds {kind(value)}, expected text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        return Refused(name, f"{field!r} holds half of a surrogate pair (character {error.start})")
    return Refused(name, _too_long(size)) if size > MAX_DOCUMENT_BYTES else Document(name, value)


# --- parquet, and the Arrow files of Hugging Face sets ---


def _row_group_parts(file: InputFile, part_bytes: int) -> Sequence[Part]:
    with parquet.ParquetFile(file.path) as reader:
        meta = reader.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        return _grouped([(g.num_rows, g.total_byte_size) for g in groups], part_bytes)


def _record_batch_parts(file: InputFile, part_bytes: int) -> Sequence[Part]:
    with _arrow_batches(file) as batches:
        return _grouped([(batch.num_rows, batch.nbytes) for batch in batches], part_bytes)


def _grouped(sizes: Sequence[tuple[int, int]], part_bytes: int) -> Sequence[Part]:
    """Neighbours of (rows, bytes) together, until they hold a part's bytes."""
    found: list[Part] = []
    start, row, first, held = 0, 1, 1, 0
    for index, (rows, size) in enumerate(sizes):
        row, held = row + rows, held + size
        if held >= part_bytes or index == len(sizes) - 1:
            found.append(Part(start, index + 1, first))
            start, first, held = index + 1, row, 0
    return found or WHOLE


def _parquet_rows(item: WorkItem, field: str) -> Iterator[Document | Refused]:
    label = item.file.label
    number = item.first
    try:
        with parquet.ParquetFile(item.file.path) as reader:
            if missing := _no_column(label, field, reader.schema_arrow):
                yield from [missing] if item.start == 0 else []
                return
            stop = reader.num_row_groups if item.stop is None else item.stop
            if reader.metadata.num_rows == 0:
                yield Refused(label, "the file holds no row")
                return
            groups = list(range(item.start, stop))
            for batch in reader.iter_batches(256, row_groups=groups, columns=[field]):
                yield from _rows(label, field, batch.column(0), number)
                number += batch.num_rows
    except pa.ArrowException as error:
        where = f"{label} from row {number}" if number > 1 else label
        yield Refused(where, f"not readable as parquet: {_first_line(error)}")


def _arrow_rows(item: WorkItem, field: str) -> Iterator[Document | Refused]:
    label = item.file.label
    number, rows = item.first, 0
    try:
        with _arrow_batches(item.file) as batches:
            for index, batch in enumerate(batches):
                if index < item.start:
                    continue
                if item.stop is not None and index >= item.stop:
                    return
                if missing := _no_column(label, field, batch.schema):
                    yield from [missing] if item.start == 0 else []
                    return
                yield from _rows(label, field, batch.column(field), number)
                number, rows = number + batch.num_rows, rows + batch.num_rows
            if rows == 0 and item.start == 0:
                yield Refused(label, "the file holds no row")
    except pa.ArrowException as error:
        where = f"{label} from row {number}" if number > 1 else label
        yield Refused(where, f"not readable as Arrow: {_first_line(error)}")


@contextmanager
def _arrow_batches(file: InputFile) -> Iterator[Iterator[pa.RecordBatch]]:
    """Record batches through a memory map: those that are skipped are not read."""
    with pa.memory_map(str(file.path), "r") as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            yield (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield iter(pa.ipc.open_stream(source))


def _no_column(label: str, field: str, schema: pa.Schema) -> Refused | None:
    if field in schema.names:
        return None
    names = ", ".join(schema.names[:8]) or "none"
    return Refused(label, f"no column {field!r} (its columns: {names}); correct text_field")


def _rows(label: str, field: str, column: pa.Array, first: int) -> Iterator[Document | Refused]:
    for offset, value in enumerate(column):
        name = f"{label} row {first + offset}"
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            yield Refused(name, f"{field!r} is not UTF-8 text (byte {error.start})")
            continue
        yield _checked(name, field, text)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
