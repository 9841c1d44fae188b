"""The Large World Model's parameter file (``streaming_params``): what is in it, and where.

The file is a stream of msgpack records, each a name and one array as flax serialises it. Only heads
and lengths are parsed, so that a file of any size is looked through at once; nothing in it is ever
built or run. Imports no torch: jobs are checked with it.

Source: the formats of msgpack (github.com/msgpack/msgpack, spec.md) and of flax.serialization.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from ringworld_model.hf_config import WeightsError

FILE_NAMES = ("params", "streaming_params", "streaming_train_state")
"""What the release calls such a file, where a folder is given."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_NDARRAY = 1
_CHUNKED = "__msgpack_chunked_array__"
_LONGEST_TEXT = 4096
# First byte of a msgpack value: its kind, and the struct format of the length or number after it.
_HEADS: dict[int, tuple[str, str]] = {
    0xC0: ("nil", ""),
    0xC2: ("bool", ""),
    0xC3: ("bool", ""),
    0xC4: ("bytes", "B"),
    0xC5: ("bytes", "H"),
    0xC6: ("bytes", "I"),
    0xC7: ("ext", "B"),
    0xC8: ("ext", "H"),
    0xC9: ("ext", "I"),
    0xCC: ("int", "B"),
    0xCD: ("int", "H"),
    0xCE: ("int", "I"),
    0xCF: ("int", "Q"),
    0xD0: ("int", "b"),
    0xD1: ("int", "h"),
    0xD2: ("int", "i"),
    0xD3: ("int", "q"),
    0xD9: ("bytes", "B"),
    0xDA: ("bytes", "H"),
    0xDB: ("bytes", "I"),
    0xDC: ("array", "H"),
    0xDD: ("array", "I"),
    0xDE: ("map", "H"),
    0xDF: ("map", "I"),
}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of the file.

    Attributes:
        shape: of the array.
        dtype: float32, bfloat16, float16 or float64; others are listed, but not read.
        chunks: (offset, bytes) of its parts in the file, in order; C order together.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[tuple[int, int], ...]


def find_file(path: Path) -> Path:
    """The parameter file at ``path``: itself, or the one in that folder.

    Raises:
        WeightsError: there is none.
    """
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"{path}: holds none of {', '.join(FILE_NAMES)}; give the file")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    return path


def read_index(path: Path) -> dict[Key, StoredArray]:
    """Every array of a parameter file by its key, such as ("transformer", "wte", "embedding").

    The ``params`` that a whole train state puts before its keys are taken off, and its other parts
    left out.

    Raises:
        WeightsError: not such a file, or one that was cut off; names the byte.
    """
    size = path.stat().st_size
    found: dict[Key, StoredArray] = {}
    with path.open("rb") as file:
        reader = _Reader(path, file, size)
        while reader.position < size:
            key, array = reader.record()
            if array is not None:
                found[key] = array
    if whole := {key: array for key, array in found.items() if key[0] == "params"}:
        found = whole
    while found and all(key[0] == "params" for key in found):
        found = {key[1:]: array for key, array in found.items()}
    if not found:
        raise WeightsError(f"{path}: holds no arrays")
    return found


class _Reader:
    """Walks over msgpack values, reading heads and short text only."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self.position = 0

    def record(self) -> tuple[Key, StoredArray | None]:
        """The next key and its array; None where the value is something else, such as a number."""
        start = self.position
        self._require(self._expect("array") == 2, start, "a record of a key and an array")
        key = tuple(self._text() for _ in range(self._expect("array")))
        self._require(bool(key), start, "a key")
        length = self._expect("bytes")
        end = self.position + length
        self._require(end <= self._size, end, "more bytes")
        array = self._value()
        self._require(array is None or self.position == end, end, "the end of a record")
        self.position = end
        return key, array

    def _value(self) -> StoredArray | None:
        """What flax wrote of one value: an array, an array in chunks, or something else."""
        kind, length = self._head()
        if kind == "ext":
            return self._array(length)
        if kind != "map":
            return None
        shape: tuple[int, ...] = ()
        parts: dict[int, StoredArray] = {}
        chunked = False
        for _ in range(length):
            name = self._text()
            if name == _CHUNKED:
                chunked = self._head()[0] == "bool"
            elif name == "shape":
                numbered = {self._place(): self._size_of() for _ in range(self._expect("map"))}
                shape = tuple(numbered[place] for place in sorted(numbered))
            elif name == "chunks":
                for _ in range(self._expect("map")):
                    place = self._place()
                    part = self._array(self._expect("ext"))
                    if part is not None:
                        parts[place] = part
            else:
                return None
        dtypes = {part.dtype for part in parts.values()}
        self._require(chunked and len(dtypes) == 1, self.position, "chunks of one dtype")
        chunks = tuple(chunk for place in sorted(parts) for chunk in parts[place].chunks)
        return self._checked(StoredArray(shape, dtypes.pop(), chunks))

    def _place(self) -> int:
        """A key of the mapping from "0", "1", ... that flax makes of a tuple."""
        start, text = self.position, self._text()
        self._require(text.isdecimal(), start, "a place in a tuple")
        return int(text)

    def _size_of(self) -> int:
        start, size = self.position, self._expect("int")
        self._require(size >= 0, start, "a size")
        return size

    def _array(self, length: int) -> StoredArray | None:
        """An extension value's array; None where it is a scalar or a complex number."""
        code = self._read(1)[0]
        end = self.position + length
        if code != _NDARRAY:
            self.position = end
            return None
        self._require(self._expect("array") == 3, self.position, "shape, dtype and data")
        shape = tuple(self._size_of() for _ in range(self._expect("array")))
        dtype = self._text()
        size = self._expect("bytes")
        stored = StoredArray(shape, dtype, ((self.position, size),))
        self.position += size
        self._require(self.position == end, end, "the end of an array")
        return self._checked(stored)

    def _checked(self, array: StoredArray) -> StoredArray:
        held = sum(size for _, size in array.chunks)
        expected = prod(array.shape) * ITEM_BYTES.get(array.dtype, 0)
        known = array.dtype in ITEM_BYTES
        wanted = f"{expected} bytes of {array.dtype} {list(array.shape)}, not {held}"
        self._require(not known or held == expected, self.position, wanted)
        return array

    def _expect(self, kind: str) -> int:
        start = self.position
        found, value = self._head()
        self._require(found == kind, start, kind)
        return value

    def _text(self) -> str:
        start = self.position
        length = self._expect("bytes")
        self._require(length <= _LONGEST_TEXT, start, "a name")
        return self._read(length).decode("utf-8", "replace")

    def _head(self) -> tuple[str, int]:
        """Kind of the next value, and its number, its bytes, or how many values it holds."""
        first = self._read(1)[0]
        if first <= 0x7F:
            return "int", first
        if first <= 0x8F:
            return "map", first & 0x0F
        if first <= 0x9F:
            return "array", first & 0x0F
        if first <= 0xBF:
            return "bytes", first & 0x1F
        if first >= 0xE0:
            return "int", first - 0x100
        if first in _FIXED_EXT:
            return "ext", _FIXED_EXT[first]
        if first not in _HEADS:
            return "other", 0
        kind, form = _HEADS[first]
        if not form:
            return kind, first & 1
        value: int = struct.unpack(f">{form}", self._read(struct.calcsize(f">{form}")))[0]
        return kind, value

    def _read(self, length: int) -> bytes:
        self._file.seek(self.position)
        data = self._file.read(length)
        self._require(len(data) == length, self._size, "more bytes")
        self.position += length
        return data

    def _require(self, holds: bool, position: int, expected: str) -> None:
        if not holds:
            raise WeightsError(
                f"{self._path}: not a whole streaming parameter file: at byte {position:,} of "
                f"{self._size:,} it lacks {expected}; copy it anew"
            )
