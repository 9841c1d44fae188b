"""Work of a build, cut into tasks that do not depend on who does them.

Whether a build runs in one process or on a hundred machines, its tasks are the same, and each
leaves its result in a file of its own: so what a killed build has done is there when it is started
again, and the whole comes out the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ringworld_workers.data.draft import WorkItem

TASK_BYTES = 8 << 20
"""Small files are read together until they hold so many bytes."""
TASK_FILES = 256
"""And no more files than this: a task that dies is done again whole."""

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much (0: not known)."""


@dataclass(frozen=True, slots=True)
class Task:
    """Neighbouring items of one dataset, read by one worker at once.

    Attributes:
        dataset: name of the dataset.
        number: place among its tasks.
        items: in order.
        weight: bytes of input, roughly.
    """

    dataset: str
    number: int
    items: tuple[WorkItem, ...]
    weight: int

    @property
    def name(self) -> str:
        """File name of its result: another cut of the files is another name."""
        parts = [f"{item.file.label}\0{item.start}\0{item.stop}" for item in self.items]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return f"{self.number:06d}-{digest[:12]}"


def cut_tasks(dataset: str, items: Sequence[WorkItem]) -> list[Task]:
    """Group a dataset's items: a part of a file alone, small files together."""
    parts = Counter(item.file.label for item in items)
    tasks: list[Task] = []
    group: list[WorkItem] = []
    weight = 0

    def close() -> None:
        nonlocal group, weight
        if group:
            tasks.append(Task(dataset, len(tasks), tuple(group), weight))
        group, weight = [], 0

    for item in items:
        size = _file_bytes(item) // parts[item.file.label]
        if item.stop is not None or weight + size > TASK_BYTES or len(group) >= TASK_FILES:
            close()
        group.append(item)
        weight += size
        if item.stop is not None:
            close()
    close()
    return tasks


def _file_bytes(item: WorkItem) -> int:
    try:
        return item.file.path.stat().st_size
    except OSError:
        return 0


class Mapper(Protocol):
    """Who does the tasks."""

    place: str
    """Where, for messages."""

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        accelerated: bool = False,
    ) -> Iterator[Result]:
        """Results in any order, each as soon as it is there.

        Args:
            function: picklable; each worker unpickles it once, so it may keep what it loads.
            items: picklable.
            accelerated: it uses a GPU where there is one.
        """


class InProcess:
    """Does the tasks one after the other, here; libraries may use every core."""

    place = "in this process"

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        accelerated: bool = False,
    ) -> Iterator[Result]:
        """Results in the items' order."""
        return map(function, items)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write, which appears under its name complete or not at all.

    Several writers of the same content do no harm: the last one's stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name complete or not at all.

    What an earlier try left half done is removed. One process at a time, unlike ``written_whole``.
    """
    temporary = path.with_name(f".{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    sync_files(temporary)
    os.rename(temporary, path)


def sync_files(folder: Path) -> None:
    """Put a folder's files on the disk, so that a name that is given to it later holds them all.

    A rename may reach the disk before the content of what is renamed.
    """
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
