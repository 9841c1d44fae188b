"""Writes token shards: in bounded memory, hashed as they are written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ringworld_model.batch import TEXT, VISION
from ringworld_workers.data.shard_format import (
    SCHEMA,
    ShardEntry,
    Split,
    count_targets,
    lengths_digest,
    lengths_file,
)

FILE_BYTES = 256 << 20
"""A shard is closed before it grows past this; an example that is larger alone fills its own."""


@dataclass(slots=True)
class _Row:
    tokens: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    loss: npt.NDArray[np.uint8]
    name: str


class ShardWriter:
    """Writes one split of one dataset; use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        batch_tokens: int = 1 << 22,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        """Prepare to write ``<folder>/<split>-00000.arrow`` and its successors.

        Args:
            folder: it exists.
            split: which split.
            batch_tokens: a record batch is written once it holds so many tokens: 24 MiB of host
                memory, the last document apart.
            file_bytes: a file is closed before it grows past this; a single batch may.
        """
        self._folder, self._split = folder, split
        self._batch_tokens, self._file_bytes = batch_tokens, file_bytes
        self._shard: _Shard | None = None
        self._lengths: list[int] = []
        self._rows: list[_Row] = []
        self._pending = 0
        self._entries: list[ShardEntry] = []

    def add(
        self,
        tokens: npt.NDArray[np.int32],
        modality: npt.NDArray[np.uint8],
        loss: npt.NDArray[np.uint8],
        name: str,
    ) -> None:
        """Append one example.

        Args:
            tokens: [n] int32, at least two.
            modality: [n] uint8, of each token.
            loss: [n] uint8, 1 where predicting the token carries loss.
            name: what messages call the example.

        Raises:
            ValueError: arrays of unequal length.
        """
        if not len(tokens) == len(modality) == len(loss):
            raise ValueError(
                f"{name}: {len(tokens)} tokens, {len(modality)} modalities, {len(loss)} loss flags"
            )
        self._lengths.append(len(tokens))
        self._rows.append(_Row(tokens, modality, loss, name))
        self._pending += len(tokens)
        if self._pending >= self._batch_tokens:
            self._flush()

    def entries(self) -> list[ShardEntry]:
        """The files written, in order, once the writer is closed: ``splits.<split>.shards``."""
        return list(self._entries)

    def _flush(self) -> None:
        if not self._rows:
            return
        batch = _record_batch(self._rows)
        if self._shard is not None and not self._shard.has_room(batch, self._file_bytes):
            self._close_shard()
        if self._shard is None:
            name = f"{self._split}-{len(self._entries):05d}.arrow"
            self._shard = _Shard(self._folder / name)
        self._shard.write(batch, [len(row.tokens) for row in self._rows])
        self._rows, self._pending = [], 0

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.close())
            self._shard = None

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is pending and the length index, and close the file."""
        if kind is None:
            self._flush()
            lengths = np.asarray(self._lengths, dtype=np.int32)
            np.save(self._folder / lengths_file(self._split), lengths)
        self._close_shard()


def _record_batch(rows: list[_Row]) -> pa.RecordBatch:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row.tokens) for row in rows], out=offsets[1:])
    columns: list[pa.Array] = []
    for column, kind in (("tokens", pa.int32()), ("modality", pa.uint8()), ("loss", pa.uint8())):
        values = pa.array(np.concatenate([getattr(row, column) for row in rows]), type=kind)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), values))
    columns.append(pa.array([row.name for row in rows], type=pa.string()))
    targets = [count_targets(row.modality, row.loss) for row in rows]
    columns += [pa.array([n[m] for n in targets], type=pa.int32()) for m in (TEXT, VISION)]
    return pa.record_batch(columns, schema=SCHEMA)


class _HashedFile:
    """A file to write to that knows its size and digest: nothing is read back."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _Shard:
    """One shard in the making."""

    def __init__(self, path: Path) -> None:
        self._name, self._file = path.name, _HashedFile(path)
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._lengths: list[int] = []

    def has_room(self, batch: pa.RecordBatch, file_bytes: int) -> bool:
        return self._file.size + batch.nbytes <= file_bytes

    def write(self, batch: pa.RecordBatch, lengths: list[int]) -> None:
        self._writer.write_batch(batch)
        self._lengths += lengths

    def close(self) -> ShardEntry:
        self._writer.close()
        self._file.close()
        lengths = np.asarray(self._lengths, np.int32)
        return ShardEntry(
            file=self._name,
            examples=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            bytes=self._file.size,
            sha256=self._file.hexdigest(),
            lengths_sha256=lengths_digest(lengths),
        )
