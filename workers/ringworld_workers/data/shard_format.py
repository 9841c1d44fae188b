"""The form of token shards, version 2: Arrow files of bounded size, and a length index beside them.

A shard row is one example: ``tokens`` (int32), ``modality`` (uint8, 0 text, 1 vision), ``loss``
(uint8, 1 where predicting this token carries loss), its ``name``, and how many targets of text and
of vision it has, so that a piece of it can be weighed without reading the rest. The lengths of all
examples lie in an .npy of their own: planning reads no tokens. What a split consists of, with the
digest of every file, stands in meta.json under ``splits.<split>.shards``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ringworld_model.batch import TEXT, VISION
from ringworld_workers.data.files import DataError

FORMAT_VERSION = 2
"""Raised whenever prepared data of before can no longer be read, or would come out otherwise."""
META_FILE = "meta.json"

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("modality", pa.list_(pa.uint8())),
        ("loss", pa.list_(pa.uint8())),
        ("name", pa.string()),
        ("text_targets", pa.int32()),
        ("vision_targets", pa.int32()),
    ]
)


class ShardEntry(TypedDict):
    """One shard as meta.json lists it."""

    file: str
    examples: int
    tokens: int
    bytes: int
    sha256: str
    lengths_sha256: str
    """Of its part of the length index, int32 little-endian."""


def lengths_file(split: Split) -> str:
    """Name of a split's length index."""
    return f"{split}.lengths.npy"


def lengths_digest(lengths: npt.NDArray[np.int32]) -> str:
    """SHA-256 of a part of a length index."""
    return hashlib.sha256(np.ascontiguousarray(lengths, "<i4").data).hexdigest()


def count_targets(modality: npt.NDArray[np.uint8], loss: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Targets of text and of vision that carry loss; the first token is nobody's target."""
    counted = modality[1:][loss[1:] != 0]
    return int((counted == TEXT).sum()), int((counted == VISION).sum())


def parse_meta(content: bytes, where: str) -> dict[str, Any]:
    """A prepared folder's meta.json.

    Args:
        content: of the file.
        where: what messages call it.

    Raises:
        DataError: it is no such file, or of another format version.
    """
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); build the data again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT_VERSION:
        found = meta.get("format") if isinstance(meta, dict) else "none"
        raise DataError(
            f"{where}: format {found}, this version reads {FORMAT_VERSION}; build the data again"
        )
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta.json of a prepared dataset, or of a recipe's folder.

    Raises:
        DataError: there is none, or its format version is another.
    """
    path = folder / META_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {META_FILE}; point it at a dataset's folder as "
            f"`ringworld data build` wrote it"
        )
    return parse_meta(path.read_bytes(), str(path))
