"""Files between the tasks of a build and its assembly: a task's examples, and what became of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ringworld_workers.data.draft import Refused

DIGEST_BYTES = 16

_SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("modality", pa.list_(pa.uint8())),
        ("loss", pa.list_(pa.uint8())),
        ("name", pa.string()),
        ("held_out", pa.bool_()),
        ("digest", pa.binary(DIGEST_BYTES)),
    ]
)
_BATCH_TOKENS = 1 << 22
"""A record batch is written once it holds so many: 24 MiB, the last example apart."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example, tokenized.

    Attributes:
        name: what messages call it.
        tokens: [n] int32.
        modality: [n] uint8.
        loss: [n] uint8.
        held_out: it is kept for validation.
    """

    name: str
    tokens: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    loss: npt.NDArray[np.uint8]
    held_out: bool

    def digest(self) -> bytes:
        """Equal for examples that train alike."""
        content = hashlib.blake2b(self.tokens.data, digest_size=DIGEST_BYTES)
        content.update(self.modality.data)
        content.update(self.loss.data)
        return content.digest()


@dataclass(slots=True)
class TaskReport:
    """What became of a task's input.

    Attributes:
        examples: written.
        refused: files and records that cannot be used.
        left_out: how often the recipe left something out, by reason.
    """

    examples: int = 0
    refused: list[Refused] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def note(self, refusal: Refused) -> None:
        """Count a refusal, and list it where it is no wish of the recipe."""
        if refusal.unusable:
            self.refused.append(refusal)
        else:
            self.leave_out(refusal.reason)

    def leave_out(self, reason: str) -> None:
        """Count something that the recipe leaves out."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def to_bytes(self) -> bytes:
        """For the file beside the task's examples."""
        refused = [[entry.name, entry.reason] for entry in self.refused]
        return json.dumps([self.examples, refused, self.left_out]).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> TaskReport:
        """The inverse of ``to_bytes``."""
        examples, refused, left_out = json.loads(content)
        return cls(examples, [Refused(name, reason) for name, reason in refused], left_out)


def read_report(place: Path) -> TaskReport:
    """The report beside a task's examples."""
    return TaskReport.from_bytes(report_of(place).read_bytes())


@dataclass(frozen=True, slots=True)
class Rows:
    """Neighbouring examples of one task, joined.

    Attributes:
        names: [n].
        lengths: [n] int64, tokens of each.
        tokens: [sum of lengths] int32.
        modality: the same length, uint8.
        loss: the same length, uint8.
        held_out: [n] bool.
    """

    names: list[str]
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    loss: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.bool_]


def read_rows(place: Path) -> Iterator[Rows]:
    """A task's examples in order, through a memory map."""
    with _reader(place) as batches:
        for batch in batches:
            tokens, modality, loss = (batch.column(i) for i in range(3))
            yield Rows(
                names=batch.column("name").to_pylist(),
                lengths=np.diff(tokens.offsets.to_numpy()).astype(np.int64),
                tokens=tokens.values.to_numpy(),
                modality=modality.values.to_numpy(),
                loss=loss.values.to_numpy(),
                held_out=batch.column("held_out").to_numpy(zero_copy_only=False),
            )


def read_digests(place: Path) -> npt.NDArray[np.uint64]:
    """[n, 2] digests of a task's examples; reads nothing else of the file."""
    found = [np.zeros((0, 2), np.uint64)]
    with _reader(place) as batches:
        for batch in batches:
            values = np.frombuffer(batch.column("digest").buffers()[1], np.uint64)
            found.append(values[: 2 * batch.num_rows].reshape(-1, 2).copy())
    return np.concatenate(found)


@contextmanager
def _reader(place: Path) -> Iterator[Iterator[pa.RecordBatch]]:
    with pa.memory_map(str(place), "r") as source:
        reader = pa.ipc.open_file(source)
        yield (reader.get_batch(index) for index in range(reader.num_record_batches))


def report_of(place: Path) -> Path:
    """File of the report beside a task's examples; it is written last."""
    return place.with_suffix(".json")


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write a task's examples, a record batch in memory at a time."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        rows: list[Example] = []
        pending = 0
        for example in examples:
            rows.append(example)
            pending += len(example.tokens)
            if pending >= _BATCH_TOKENS:
                writer.write_batch(_record_batch(rows))
                rows, pending = [], 0
        if rows:
            writer.write_batch(_record_batch(rows))


def _record_batch(rows: list[Example]) -> pa.RecordBatch:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row.tokens) for row in rows], out=offsets[1:])
    columns = [
        pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(np.concatenate([getattr(row, name) for row in rows]))
        )
        for name in ("tokens", "modality", "loss")
    ]
    columns.append(pa.array([row.name for row in rows], pa.string()))
    columns.append(pa.array([row.held_out for row in rows], pa.bool_()))
    columns.append(pa.array([row.digest() for row in rows], pa.binary(DIGEST_BYTES)))
    return pa.record_batch(columns, schema=_SCHEMA)
