"""The lines of jsonl files as JSON objects, in parts of bounded size.

A line that is none is refused by its number; the rest counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from ringworld_workers.data.draft import Refused, WorkItem

_HEAD_BYTES = 8192


@dataclass(frozen=True, slots=True)
class JsonLine:
    """One line that is a JSON object.

    Attributes:
        name: its file, and the line in it.
        number: of the line, from 1; blank lines count.
        content: the line's bytes, without the space around them.
        value: the object.
    """

    name: str
    number: int
    content: bytes
    value: dict[str, Any]


def json_lines(item: WorkItem, max_bytes: int) -> Iterator[JsonLine | Refused]:
    """The lines of a file or of a range of its bytes, in order, streamed; blank ones are none.

    A line belongs to the range that it starts in.

    Args:
        item: the range; ``first`` is the number of the line that holds its first byte.
        max_bytes: longer lines are refused.

    Raises:
        OSError: the file cannot be read.
    """
    label, number, empty = item.file.label, item.first, True
    with item.file.path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        if not head or b"\0" in head:
            if item.start == 0:
                why = "holds NUL bytes: no jsonl, whatever its name says"
                yield Refused(label, why if head else "the file is empty")
            return
        # The line that the range starts in the middle of is its predecessor's. Where it starts with
        # a line, this reads no more than the end of the line before, which was counted there.
        stream.seek(max(0, item.start - 1))
        if item.start > 0:
            number += _skip(stream) > 1
        while item.stop is None or stream.tell() < item.stop:
            line = stream.readline(max_bytes + 1)
            if not line:
                break
            name = f"{label} line {number}"
            if len(line) > max_bytes:
                if not line.endswith(b"\n"):
                    _skip(stream)
                empty = False
                yield Refused(name, f"longer than the limit of {max_bytes:,} bytes")
            elif line.strip():
                empty = False
                yield _object(name, number, line)
            number += 1
    if empty and item.start == 0 and item.stop is None:
        yield Refused(label, "every line of the file is blank")


def kind(value: object) -> str:
    """What JSON calls a value's type."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _skip(stream: BinaryIO) -> int:
    """Read to the end of the line; returns the bytes."""
    read = 0
    while chunk := stream.readline(1 << 20):
        read += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return read


def _object(name: str, number: int, line: bytes) -> JsonLine | Refused:
    content = line.strip()
    try:
        value = json.loads(content.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Refused(name, f"not UTF-8 text (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return Refused(name, f"not JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return Refused(name, "not JSON that can be read: nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return Refused(name, f"not JSON that can be read: {error}")
    if not isinstance(value, dict):
        return Refused(name, f"holds {kind(value)}, expected an object")
    return JsonLine(name, number, content, value)
