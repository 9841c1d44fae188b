"""Is a prepared dataset what its meta.json says? Every file, every row, and all findings at once.

Nothing stops at the first finding: a damaged shard is reported by its digest and, as far as it can
still be read, by the rows that are wrong.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ringworld_model.vision.frame_tokenizer import load_frame_tokenizer
from ringworld_workers.data.check_rows import Batch, check_batch
from ringworld_workers.data.decode import find_datasets
from ringworld_workers.data.files import DataError
from ringworld_workers.data.shard_format import (
    META_FILE,
    SCHEMA,
    SPLITS,
    ShardEntry,
    Split,
    lengths_digest,
    lengths_file,
    read_meta,
)
from ringworld_workers.data.tokenizer import load_tokenizer

_META_FIELDS = ("name", "kind", "longer", "pack_apart", "tokenizer", "codebook", "splits")
_TOTALS = ("examples", "tokens", "text_tokens", "vision_tokens", "longest_example_tokens")

Progress = Callable[[str], None]


def check_prepared(place: Path, on_file: Progress | None = None) -> list[str]:
    """Check a prepared recipe with all its datasets, or one dataset.

    Args:
        place: its folder.
        on_file: told which file is being read.

    Returns:
        What is wrong, each with its file and row; empty: nothing.
    """
    try:
        folder, datasets = find_datasets(place)
    except DataError as error:
        return [str(error)]
    tokenizers, findings = _check_tokenizers(folder)
    for name, dataset in datasets.items():
        check = _DatasetCheck(name, dataset, tokenizers, on_file or _ignore)
        findings += check.run()
    return findings


def _ignore(file: str) -> None:
    pass


def _check_tokenizers(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the tokenizers beside the datasets are, and whether the recipe's meta.json says so."""
    found: dict[str, Any] = {"tokenizer": None, "codebook": None}
    findings: list[str] = []
    try:
        meta = read_meta(folder)
    except DataError:
        return found, findings  # a dataset alone: there is nothing to compare it with
    try:
        tokenizer = load_tokenizer(folder)
        found["tokenizer"] = {"size": tokenizer.size, "digest": tokenizer.digest()}
    except (DataError, ValueError, OSError) as error:
        findings.append(f"tokenizer: {error}")
    if meta.get("codebook") is not None:
        try:
            frames = load_frame_tokenizer(folder)
            found["codebook"] = {"size": frames.codebook_size, "digest": frames.digest()}
        except (ValueError, OSError) as error:
            findings.append(f"codebook: {error}")
    for part, here in found.items():
        findings += _compare_vocabulary(META_FILE, part, meta.get(part), here)
    return found, findings


def _compare_vocabulary(
    where: str, part: str, said: Mapping[str, Any] | None, here: Mapping[str, Any] | None
) -> Iterator[str]:
    if not said or not here:
        return
    for key in ("size", "digest"):
        if said.get(key) != here[key]:
            yield (
                f"{where}: {part}.{key} is {said.get(key)}, the {part} that lies beside it has "
                f"{here[key]}"
            )


class _DatasetCheck:
    def __init__(
        self, name: str, folder: Path, tokenizers: Mapping[str, Any], on_file: Progress
    ) -> None:
        self.name, self.folder, self.tokenizers = name, folder, tokenizers
        self.on_file = on_file
        self.meta: dict[str, Any] = {}
        self.findings: list[str] = []

    def say(self, finding: str) -> None:
        self.findings.append(f"{self.name}/{finding}")

    def run(self) -> list[str]:
        try:
            self.meta = read_meta(self.folder)
        except (DataError, OSError) as error:
            self.say(f"{META_FILE}: {error}")
            return self.findings
        missing = [field for field in _META_FIELDS if field not in self.meta]
        if missing:
            self.say(f"{META_FILE}: {', '.join(missing)} missing")
            return self.findings
        self.findings += _compare_vocabulary(
            f"{self.name}/{META_FILE}",
            "tokenizer",
            self.meta["tokenizer"],
            self.tokenizers["tokenizer"],
        )
        if self.meta["kind"] != "lwm":  # whose codes may come from elsewhere
            self.findings += _compare_vocabulary(
                f"{self.name}/{META_FILE}",
                "codebook",
                self.meta["codebook"],
                self.tokenizers["codebook"],
            )
        for split in SPLITS:
            if split in self.meta["splits"]:
                self._split(split, self.meta["splits"][split])
            else:
                self.say(f"{META_FILE}: splits.{split} missing")
        return self.findings

    def _split(self, split: Split, summary: Mapping[str, Any]) -> None:
        entries: list[ShardEntry] = summary.get("shards", [])
        lengths = self._lengths(split, entries)
        totals = dict.fromkeys(_TOTALS, 0)
        start = 0
        readable = True
        for entry in entries:
            indexed = None if lengths is None else lengths[start : start + entry["examples"]]
            found = self._shard(entry, start, indexed)
            readable &= found is not None
            for key, value in (found or {}).items():
                longest = key == "longest_example_tokens"
                totals[key] = max(totals[key], value) if longest else totals[key] + value
            start += entry["examples"]
        for key in _TOTALS if readable else ():
            if key in summary and summary[key] != totals[key]:
                self.say(
                    f"{META_FILE}: splits.{split}.{key} is {summary[key]:,}, the shards hold "
                    f"{totals[key]:,}"
                )

    def _lengths(self, split: Split, entries: list[ShardEntry]) -> npt.NDArray[np.int32] | None:
        file = lengths_file(split)
        self.on_file(f"{self.name}/{file}")
        try:
            content = (self.folder / file).read_bytes()
            lengths: npt.NDArray[np.int32] = np.load(io.BytesIO(content), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            self.say(f"{file}: cannot be read: {error}")
            return None
        expected = sum(entry["examples"] for entry in entries)
        if lengths.dtype != np.int32 or lengths.ndim != 1 or len(lengths) != expected:
            self.say(
                f"{file}: {lengths.dtype} {list(lengths.shape)}; int32 [{expected}] is what the "
                "shards hold"
            )
            return None
        start = 0
        for entry in entries:
            stop = start + entry["examples"]
            if lengths_digest(lengths[start:stop]) != entry["lengths_sha256"]:
                self.say(f"{file}: rows {start}-{stop - 1} are not as written for {entry['file']}")
            start = stop
        return lengths

    def _shard(
        self, entry: ShardEntry, start: int, indexed: npt.NDArray[np.int32] | None
    ) -> dict[str, int] | None:
        file = entry["file"]
        self.on_file(f"{self.name}/{file}")
        path = self.folder / file
        try:
            size = path.stat().st_size
            with path.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            self.say(f"{file}: cannot be read: {error.strerror or error}")
            return None
        if size != entry["bytes"]:
            self.say(f"{file}: {size:,} bytes, {entry['bytes']:,} were written")
        elif digest != entry["sha256"]:
            self.say(f"{file}: sha256 {digest}, meta.json says {entry['sha256']}")
        totals = dict.fromkeys(_TOTALS, 0)
        try:
            with pa.memory_map(str(path), "r") as mapped:
                reader = pa.ipc.open_file(mapped)
                if reader.schema != SCHEMA:
                    self.say(f"{file}: columns {reader.schema.names}, expected {SCHEMA.names}")
                    return None
                row = 0
                for number in range(reader.num_record_batches):
                    record = reader.get_batch(number)
                    record.validate(full=True)
                    lengths = None if indexed is None else indexed[row : row + record.num_rows]
                    batch = Batch.of(record, self.meta, lengths)
                    for found in check_batch(batch):
                        where = f"row {start + row + found.row} ({batch.names[found.row]})"
                        self.say(f"{file}: {where}: {found.what}")
                    batch.add_to(totals)
                    row += record.num_rows
                if row != entry["examples"]:
                    self.say(f"{file}: {row} rows, meta.json says {entry['examples']}")
        except (pa.ArrowException, OSError, ValueError) as error:
            self.say(f"{file}: cannot be read as a shard: {error}")
            return None
        return totals
