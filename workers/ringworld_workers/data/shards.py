"""Token shards: one Arrow file a split, memory-mapped, and a length index beside it.

A shard row is one document or one clip with its caption: ``tokens`` (int32), ``modality`` (uint8,
0 text, 1 vision) and ``loss`` (uint8, 1 where predicting this token carries loss), and its
``name``. The lengths lie in an .npy of their own, so that planning reads no tokens.
"""

from __future__ import annotations

import bisect
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ringworld_model.packing import Example
from ringworld_workers.data.files import DataError

FORMAT_VERSION = 1
"""Raised whenever prepared data of before can no longer be read, or would come out otherwise."""

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

_SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("modality", pa.list_(pa.uint8())),
        ("loss", pa.list_(pa.uint8())),
        ("name", pa.string()),
    ]
)


class ShardWriter:
    """Writes one split of one dataset; use it as a context manager."""

    def __init__(self, folder: Path, split: Split, batch_tokens: int = 1 << 22) -> None:
        """Open ``<folder>/<split>.arrow``.

        Args:
            folder: it exists.
            split: which split.
            batch_tokens: a record batch is written once it holds so many tokens: 24 MiB of host
                memory, the last document apart.
        """
        self._batch_tokens = batch_tokens
        self._lengths_path = folder / f"{split}.lengths.npy"
        self._file = pa.OSFile(str(folder / f"{split}.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._lengths: list[int] = []
        self._rows: list[tuple[Any, Any, Any, str]] = []
        self._pending = 0

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
        """
        self._lengths.append(len(tokens))
        self._rows.append((tokens, modality, loss, name))
        self._pending += len(tokens)
        if self._pending >= self._batch_tokens:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        offsets = np.zeros(len(self._rows) + 1, dtype=np.int32)
        np.cumsum([len(row[0]) for row in self._rows], out=offsets[1:])
        columns: list[pa.Array] = []
        for column, kind in ((0, pa.int32()), (1, pa.uint8()), (2, pa.uint8())):
            values = pa.array(np.concatenate([row[column] for row in self._rows]), type=kind)
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), values))
        columns.append(pa.array([row[3] for row in self._rows], type=pa.string()))
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._rows, self._pending = [], 0

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
            np.save(self._lengths_path, np.asarray(self._lengths, dtype=np.int32))
        self._writer.close()
        self._file.close()


class Dataset:
    """One split of a prepared dataset, read through a memory map.

    Attributes:
        folder: where it lies.
        split: "train" or "held_out".
        meta: the dataset's meta.json.
        lengths: [N] int32, tokens of each example.
        splittable: whether an example may be cut into pieces (text documents) or not (clips).
    """

    def __init__(self, folder: Path | str, split: Split) -> None:
        """Open a split.

        Raises:
            DataError: the folder holds no prepared dataset, or one of another format version.
        """
        self.folder = Path(folder)
        self.split = split
        self.meta = read_meta(self.folder)
        self.splittable = bool(self.meta["splittable"])
        self.lengths: npt.NDArray[np.int32] = np.load(self.folder / f"{split}.lengths.npy")
        self._map = pa.memory_map(str(self.folder / f"{split}.arrow"), "r")
        reader = pa.ipc.open_file(self._map)
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        rows = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        self._starts: list[int] = rows.tolist()
        if self._starts[-1] != len(self.lengths):
            raise DataError(
                f"{self.folder}/{split}.arrow holds {self._starts[-1]} examples, its length index "
                f"{len(self.lengths)}; build the data again"
            )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.folder}/{self.split}.arrow")
        batch = bisect.bisect_right(self._starts, index) - 1
        return self._batches[batch], index - self._starts[batch]

    def name(self, index: int) -> str:
        """What the example is called: a file, or a clip's place in a video and its layout."""
        batch, row = self._locate(index)
        return str(batch.column("name")[row])

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Example:
        """One example, or a piece of it.

        The target of a piece's last token is the next token of the document, so that cutting
        loses none; at the document's end there is none, and no loss.

        Args:
            index: which example.
            start: first token.
            stop: one past the last token; empty: to the end.

        Raises:
            IndexError: no such example.
            ValueError: not a piece of it, or a piece of an example that may not be cut.
        """
        batch, row = self._locate(index)
        length = int(self.lengths[index])
        stop = length if stop is None else stop
        if not 0 <= start < stop <= length:
            raise ValueError(f"tokens {start}-{stop} of an example of {length} tokens")
        if not self.splittable and (start, stop) != (0, length):
            raise ValueError(f"{self.folder} is not splittable; asked for {start}-{stop}/{length}")
        end = min(stop + 1, length)
        tokens = _slice(batch, "tokens", row, start, end)
        modality = _slice(batch, "modality", row, start, end)
        loss = _slice(batch, "loss", row, start, end)
        n = stop - start
        targets, target_modality, loss_mask = (
            np.zeros(n, np.int32),
            np.zeros(n, np.uint8),
            np.zeros(n, np.uint8),
        )
        follows = end - start - 1
        targets[:follows] = tokens[1:]
        target_modality[:follows] = modality[1:]
        loss_mask[:follows] = loss[1:]
        return Example(
            tokens=tokens[:n],
            modality=modality[:n],
            targets=targets,
            target_modality=target_modality,
            loss_mask=loss_mask,
        )


def _slice(batch: pa.RecordBatch, column: str, row: int, start: int, stop: int) -> Any:
    """Tokens [start, stop) of a row: a view into the memory map, no copy."""
    lists = batch.column(column)
    first = lists.offsets[row].as_py()
    return lists.values.slice(first + start, stop - start).to_numpy(zero_copy_only=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """A prepared dataset's meta.json.

    Raises:
        DataError: there is none, or its format version is another.
    """
    path = folder / "meta.json"
    if not path.is_file():
        raise DataError(
            f"{folder} holds no meta.json; point it at a dataset's folder as "
            f"`ringworld data build` wrote it"
        )
    meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if meta.get("format") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format {meta.get('format')}, this version reads {FORMAT_VERSION}; "
            f"build the data again"
        )
    return meta
