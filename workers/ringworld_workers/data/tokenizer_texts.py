"""The texts that a recipe's tokenizer is trained on, taken from all its datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringworld_workers.data.draft import DatasetReader, WorkItem
from ringworld_workers.data.work import Task, written_whole

LEAST_SHARE = 1024
"""Bytes of a document: where an equal share were less, fewer documents are taken."""


@dataclass(frozen=True, slots=True)
class CountTexts:
    """Counts a task's training texts: the share of each depends on how many there are."""

    readers: Mapping[str, DatasetReader]
    folder: Path

    def __call__(self, task: Task) -> int:
        """The number of texts; counted once."""
        place = self.folder / task.dataset / f"{task.name}.count"
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            count = sum(1 for _ in _texts(self.readers, task))
            with written_whole(place) as path:
                path.write_text(str(count), encoding="ascii")
        return int(place.read_text(encoding="ascii"))


@dataclass(frozen=True, slots=True)
class Share:
    """How much is taken of each text.

    Attributes:
        bytes: from its start; None: all.
        every: of so many texts, one.
    """

    bytes: int | None = None
    every: int = 1

    @classmethod
    def of(cls, max_bytes: int | None, count: int) -> Share:
        """An equal share of ``max_bytes`` for ``count`` texts."""
        if max_bytes is None or count == 0:
            return cls()
        every = max(1, -(-count * LEAST_SHARE // max(1, max_bytes)))
        return cls(max_bytes // -(-count // every), every)


@dataclass(frozen=True, slots=True)
class TextShare:
    """What is taken of a task's training texts.

    Attributes:
        task: the task.
        share: of each text.
        first: texts before its own.
    """

    task: Task
    share: Share
    first: int


@dataclass(frozen=True, slots=True)
class TakeTexts:
    """Cuts a task's training texts to their share, into a file of its own."""

    readers: Mapping[str, DatasetReader]
    folder: Path

    def __call__(self, part: TextShare) -> None:
        """Take a task's texts; once."""
        place = self.place(part.task)
        if place.is_file():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as path, path.open("w", encoding="utf-8") as file:
            for number, text in enumerate(_texts(self.readers, part.task), part.first):
                if number % part.share.every == 0:
                    # A cut may fall inside a character; its rest is dropped.
                    kept = text.encode()[: part.share.bytes].decode(errors="ignore")
                    file.write(json.dumps(kept) + "\n")

    def place(self, task: Task) -> Path:
        """Where a task's texts are."""
        return self.folder / task.dataset / f"{task.name}.texts"


def once(tasks: Sequence[Task], reads: Callable[[str], str]) -> Iterator[Task]:
    """The tasks, without items that another dataset of the same kind reads as well.

    Args:
        tasks: of all datasets.
        reads: kind of a dataset by its name.
    """
    seen: dict[bytes, str] = {}
    for task in tasks:
        fresh: list[WorkItem] = []
        for item in task.items:
            key = f"{reads(task.dataset)}\0{item.file.label}\0{item.start}\0{item.stop}"
            digest = hashlib.sha256(key.encode()).digest()
            # Within one dataset a file may stand for several documents.
            if seen.setdefault(digest, task.dataset) == task.dataset:
                fresh.append(item)
        if fresh:
            yield Task(task.dataset, task.number, tuple(fresh), task.weight)


def stored_texts(places: Sequence[Path]) -> Iterator[str]:
    """All texts of ``TakeTexts``, in order."""
    for place in places:
        with place.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def _texts(readers: Mapping[str, DatasetReader], task: Task) -> Iterator[str]:
    for item in task.items:
        yield from readers[task.dataset].training_texts(item)
