"""Records of jsonl and parquet files, in parts of bounded size.

What cannot be read is refused by file and line or row; the rest counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import parquet

from ringworld_jobs.recipe_dataset import DatasetBase
from ringworld_workers.data.draft import Refused, WorkItem
from ringworld_workers.data.files import DataError, InputFile, resolve
from ringworld_workers.data.held_out import drawn_held_out, named_held_out
from ringworld_workers.data.json_lines import JsonLine, json_lines, kind
from ringworld_workers.data.text_sources import Part, parts

RecordFormat = Literal["jsonl", "parquet"]
MAX_RECORD_BYTES = 256 << 20
"""Longer lines are refused: 4,000 frames of 256 codes take about 6 MB."""

_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes:
        name: its file, and the line or row in it.
        number: of the line or row, from 1; blank lines count.
        value: its keys and values.
        digest: SHA-256 (hex) of its content: copies of a record are one document.
    """

    name: str
    number: int
    value: dict[str, Any]
    digest: str


class RecordFiles:
    """The files of a dataset of records, and which of it is held out. Picklable."""

    def __init__(
        self, name: str, dataset: DatasetBase, patterns: Sequence[str], base: Path, seed: int
    ) -> None:
        """Remember where to look; nothing is read yet.

        Args:
            name: of the dataset.
            dataset: which of it is held out.
            patterns: of its files.
            base: folder of the recipe.
            seed: of the recipe, which draws the held-out share.
        """
        self._name, self._dataset, self._base, self._seed = name, dataset, base, seed
        self._patterns = tuple(patterns)
        self._held_out: frozenset[str] | None = None

    def files(self) -> list[InputFile]:
        """The files by label, each once.

        Raises:
            DataError: a pattern matches none.
        """
        found: dict[str, InputFile] = {}
        for pattern in self._patterns:
            try:
                found.update((file.label, file) for file in resolve(pattern, self._base))
            except DataError as error:
                raise DataError(f"datasets.{self._name}.files: {error}") from error
        return [found[label] for label in sorted(found)]

    def items(self, cut: Callable[[InputFile], Sequence[Part]] | None = None) -> list[WorkItem]:
        """The files, large ones in parts.

        Args:
            cut: the parts of a file; None: of bounded size.

        Raises:
            DataError: a pattern of files or held_out matches nothing.
        """
        files = self.files()
        self._names(files)
        cut = cut or (lambda file: parts(file, record_format(file)))
        numbered = enumerate((file, part) for file in files for part in cut(file))
        return [
            WorkItem(self._name, number, file, part.start, part.stop, part.first)
            for number, (file, part) in numbered
        ]

    def named_held_out(self, file: InputFile) -> bool | None:
        """A draft's ``held_out``: True where the file's name matches, else the share decides."""
        return True if file.label in self._names() else None

    def certainly_held_out(self, file: InputFile, document: str) -> bool:
        """Whether no tokenizer may learn from a document."""
        share = self._dataset.held_out_share
        return bool(self.named_held_out(file)) or drawn_held_out(document, share, self._seed)

    def _names(self, files: Sequence[InputFile] | None = None) -> frozenset[str]:
        if self._held_out is None:
            patterns = self._dataset.held_out
            self._held_out = named_held_out(
                self._name, patterns, (files or self.files()) if patterns else ()
            )
        return self._held_out


def record_format(file: InputFile) -> RecordFormat:
    """Parquet where the suffix says so, else jsonl."""
    return "parquet" if file.path.suffix.lower() == ".parquet" else "jsonl"


def records(item: WorkItem) -> Iterator[Record | Refused]:
    """The records of a file or part, in order, streamed."""
    try:
        if record_format(item.file) == "parquet":
            yield from _rows(item)
        else:
            for line in json_lines(item, MAX_RECORD_BYTES):
                yield line if isinstance(line, Refused) else _record(line)
    except OSError as error:
        yield Refused(item.file.label, f"cannot be read: {error.strerror or error}")


def require_text(what: str, value: object) -> str:
    """The value, if it is text that can be encoded.

    Raises:
        ValueError: it is not; names ``what``.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} holds {kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a surrogate pair (character {error.start})") from None
    return value


def _record(line: JsonLine) -> Record:
    digest = hashlib.sha256(line.content).hexdigest()
    return Record(line.name, line.number, line.value, digest)


def _rows(item: WorkItem) -> Iterator[Record | Refused]:
    label, number = item.file.label, item.first
    try:
        with parquet.ParquetFile(item.file.path) as reader:
            if reader.metadata.num_rows == 0:
                yield Refused(label, "the file holds no record")
                return
            stop = reader.num_row_groups if item.stop is None else item.stop
            groups = list(range(item.start, stop))
            for batch in reader.iter_batches(_BATCH_ROWS, row_groups=groups):
                for row in range(batch.num_rows):
                    yield _row(f"{label} row {number}", number, batch.slice(row, 1))
                    number += 1
    except pa.ArrowException as error:
        where = f"{label} from row {number}" if number > 1 else label
        yield Refused(where, f"not readable as parquet: {str(error).strip().splitlines()[0]}")


def _row(name: str, number: int, row: pa.RecordBatch) -> Record | Refused:
    try:
        value = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Refused(name, f"not UTF-8 text (byte {error.start} of a value)")
    content = json.dumps(value, sort_keys=True, default=str)
    return Record(name, number, value, hashlib.sha256(content.encode()).hexdigest())
