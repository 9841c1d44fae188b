"""Parts of the examples that run without fetching anything."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def novels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("novels", EXAMPLES / "novels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(lines: list[str], version: int, kind: int = 16) -> bytes:
    """R's serialization of a character vector, as R Internals describes it, in a lazy-load file."""
    header = b"X\n" + struct.pack(">3I", version, 0x040301, 0x020300)
    if version == 3:
        header += struct.pack(">I", 5) + b"UTF-8"
    body = struct.pack(">2I", kind, len(lines))
    for line in lines:
        text = line.encode()
        body += struct.pack(">2I", 0x40009, len(text)) + text
    stream = zlib.compress(header + body)
    return struct.pack(">I", len(header + body)) + stream


def test_novels_are_read_from_both_versions_of_r_s_files(novels: ModuleType) -> None:
    first, second = ["EMMA", "", "She was “handsome”."], ["PERSUASION"]
    content = record(first, version=3) + record(second, version=2)
    assert list(novels.vectors(content)) == [first, second]
    missing = record(["EMMA", "x"], version=2)
    stream = zlib.decompress(missing[4:])
    stream = stream.replace(struct.pack(">2I", 0x40009, 1) + b"x", struct.pack(">Ii", 9, -1))
    assert list(novels.vectors(bytes(4) + zlib.compress(stream))) == [["EMMA", ""]]


def test_other_records_are_refused(novels: ModuleType) -> None:
    with pytest.raises(ValueError, match="no character vector"):
        list(novels.vectors(record(["1"], version=3, kind=13)))
    broken = zlib.decompress(record(["EMMA"], version=2)[4:]).replace(
        b"\x00\x04\x00\x09", b"\0\0\0\1"
    )
    with pytest.raises(ValueError, match="no string"):
        list(novels.vectors(bytes(4) + zlib.compress(broken)))
