"""Prepared datasets, read through memory maps: whole examples and pieces of them."""

from __future__ import annotations

import bisect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ringworld_model.packing import Example
from ringworld_workers.data.files import DataError
from ringworld_workers.data.shard_cache import ShardCache
from ringworld_workers.data.shard_format import (
    FORMAT_VERSION,
    META_FILE,
    SPLITS,
    ShardEntry,
    Split,
    lengths_digest,
    lengths_file,
    parse_meta,
    read_meta,
)
from ringworld_workers.data.shard_places import RemoteShards, open_shards
from ringworld_workers.data.shard_writer import ShardWriter
from ringworld_workers.data.source_walk import BLOCK_SHARDS

OPEN_REMOTE_SHARDS = BLOCK_SHARDS
"""Shards of a remote dataset that a reader keeps mapped at a time."""

__all__ = ["FORMAT_VERSION", "SPLITS", "Dataset", "ShardWriter", "Split", "read_meta"]


class Dataset:
    """One split of a prepared dataset.

    Attributes:
        place: the folder or URL where it lies.
        split: "train" or "held_out".
        meta: the dataset's meta.json.
        entries: its shards.
        lengths: [N] int32, tokens of each example that is kept.
        remote: whether shards are fetched.
        longer: what happens to an example that is longer than a row: split, drop or refuse.
        pack_apart: whether its rows hold no other dataset's examples.
    """

    def __init__(self, place: Path | str, split: Split, cache: ShardCache | None = None) -> None:
        """Open a split; its shards are opened as they are read.

        Args:
            place: a folder, or a URL (``s3://bucket/folder``).
            split: which split.
            cache: where shards of a URL are kept.

        Raises:
            DataError: the place holds no prepared dataset, one of another format version, or a
                length index that is not the one of its shards.
        """
        self.place, self.split = str(place), split
        self._shards = open_shards(self.place, cache)
        self.remote = isinstance(self._shards, RemoteShards)
        self.meta: Mapping[str, Any] = parse_meta(
            self._shards.read(META_FILE), self._shards.where(META_FILE)
        )
        try:
            self.longer: str = self.meta["longer"]
            self.pack_apart = bool(self.meta["pack_apart"])
            self.entries: list[ShardEntry] = self.meta["splits"][split]["shards"]
        except KeyError as error:
            raise DataError(
                f"{self._shards.where(META_FILE)} is not a dataset's: it has no {error}; a "
                "prepared recipe's datasets are the folders in it"
            ) from None
        self.lengths = self._read_lengths()
        starts = np.cumsum([0] + [entry["examples"] for entry in self.entries])
        self._starts: list[int] = starts.tolist()
        self._open: dict[int, _Shard] = {}
        self._rows: npt.NDArray[np.int64] | None = None
        self._check_lengths()
        if split == "train":  # held-out rows are read once, in order
            self._shards.admit(self.entries)

    def _read_lengths(self) -> npt.NDArray[np.int32]:
        file = lengths_file(self.split)
        content = self._shards.read(file)
        try:
            lengths: npt.NDArray[np.int32] = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(
                f"{self._shards.where(file)} is damaged ({error}); build the data again"
            ) from error
        return lengths

    def _check_lengths(self) -> None:
        where = self._shards.where(lengths_file(self.split))
        if self._starts[-1] != len(self.lengths):
            raise DataError(
                f"{where} counts {len(self.lengths)} examples, the shards hold "
                f"{self._starts[-1]}; build the data again"
            )
        for entry, start, stop in zip(self.entries, self._starts, self._starts[1:], strict=False):
            if lengths_digest(self.lengths[start:stop]) != entry["lengths_sha256"]:
                raise DataError(
                    f"{where} is damaged: its examples {start}-{stop - 1} are not those of "
                    f"{entry['file']}; build the data again"
                )

    @property
    def splittable(self) -> bool:
        """Whether an example may be cut into pieces."""
        return self.longer == "split"

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Kept examples of each shard."""
        if self._rows is None:
            return tuple(entry["examples"] for entry in self.entries)
        return tuple(np.diff(np.searchsorted(self._rows, self._starts)).tolist())

    def keep_lengths(self, least: int | None, below: int | None) -> int:
        """Keep only examples of ``least`` tokens or more and of fewer than ``below``.

        Those that are kept are numbered anew; ``row`` has their place in the whole dataset.

        Returns:
            How many were left out now.
        """
        kept = self.lengths >= (least or 0)
        if below is not None:
            kept &= self.lengths < below
        if kept.all():
            return 0
        rows = np.flatnonzero(kept)
        self._rows = rows if self._rows is None else self._rows[rows]
        self.lengths = self.lengths[rows]
        return len(kept) - len(rows)

    def row(self, index: int) -> int:
        """Place in the whole dataset of a kept example."""
        return index if self._rows is None else int(self._rows[index])

    def prefetch(self, blocks: Sequence[Sequence[int]]) -> None:
        """Have remote shards fetched in the background; the first block matters most."""
        self._shards.prefetch([[self.entries[shard] for shard in block] for block in blocks])

    def __len__(self) -> int:
        """Number of examples that are kept."""
        return len(self.lengths)

    def _locate(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.place} ({self.split})")
        row = self.row(index)
        number = bisect.bisect_right(self._starts, row) - 1
        shard = self._open.get(number)
        if shard is None:
            entry = self.entries[number]
            if self.remote and len(self._open) >= OPEN_REMOTE_SHARDS:
                # An open map keeps its file's blocks on the disk, even if the cache removed it.
                del self._open[next(iter(self._open))]
            shard = self._open[number] = _Shard(self._shards.open(entry), entry)
        return shard.locate(row - self._starts[number])

    def name(self, index: int) -> str:
        """What the example is called: a file, or a clip's place in a video and its layout."""
        batch, row = self._locate(index)
        return str(batch.names[row])

    def raw(
        self, index: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Tokens, modality and loss flags of a whole example, as they were written; [n] each."""
        batch, row = self._locate(index)
        here = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        return batch.tokens[here], batch.modality[here], batch.loss[here]

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
            DataError: the shard is damaged or cannot be had.
        """
        length = int(self.lengths[index]) if 0 <= index < len(self) else 0
        batch, row = self._locate(index)
        stop = length if stop is None else stop
        if not 0 <= start < stop <= length:
            raise ValueError(f"tokens {start}-{stop} of an example of {length} tokens")
        if not self.splittable and (start, stop) != (0, length):
            raise ValueError(
                f"{self.place} may not be cut (longer: {self.longer}); asked for "
                f"{start}-{stop}/{length}"
            )
        first = int(batch.offsets[row]) + start
        n, follows = stop - start, min(stop + 1, length) - start - 1
        after = slice(first + 1, first + 1 + follows)
        return Example(
            tokens=batch.tokens[first : first + n],
            modality=batch.modality[first : first + n],
            targets=_padded(batch.tokens[after], n),
            target_modality=_padded(batch.modality[after], n),
            loss_mask=_padded(batch.loss[after], n),
            whole_targets=(int(batch.text_targets[row]), int(batch.vision_targets[row])),
        )


def _padded(values: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """The values, and a zero where the document has ended."""
    if len(values) == length:
        return values
    return np.concatenate([values, np.zeros(length - len(values), values.dtype)])


@dataclass(frozen=True, slots=True)
class _Batch:
    """A record batch as views into the memory map; nothing is copied."""

    offsets: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    loss: npt.NDArray[np.uint8]
    names: pa.Array
    text_targets: npt.NDArray[np.int32]
    vision_targets: npt.NDArray[np.int32]

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Batch:
        lists = {name: batch.column(name) for name in ("tokens", "modality", "loss")}
        return cls(
            offsets=lists["tokens"].offsets.to_numpy(),
            **{name: column.values.to_numpy() for name, column in lists.items()},
            names=batch.column("name"),
            text_targets=batch.column("text_targets").to_numpy(),
            vision_targets=batch.column("vision_targets").to_numpy(),
        )


class _Shard:
    """An open shard."""

    def __init__(self, file: pa.MemoryMappedFile, entry: ShardEntry) -> None:
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._batches = [_Batch.of(batch) for batch in batches]
        self._starts: list[int] = np.cumsum([0] + [b.num_rows for b in batches]).tolist()
        if self._starts[-1] != entry["examples"]:
            raise DataError(
                f"{entry['file']} holds {self._starts[-1]} examples, meta.json says "
                f"{entry['examples']}; build the data again"
            )

    def locate(self, row: int) -> tuple[_Batch, int]:
        number = bisect.bisect_right(self._starts, row) - 1
        return self._batches[number], row - self._starts[number]
