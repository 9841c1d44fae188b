"""Images and videos ahead of the examples that hold them: each is decoded and encoded once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from ringworld_workers.data.files import DataError, InputFile
from ringworld_workers.data.media_store import MediaStore, Sampling
from ringworld_workers.data.work import TASK_BYTES, TASK_FILES


@dataclass(frozen=True, slots=True)
class MediaTask:
    """Some media.

    Attributes:
        media: which, and which of their frames.
        weight: bytes of the files.
    """

    media: tuple[tuple[InputFile, Sampling], ...]
    weight: int


def media_tasks(media: Iterable[tuple[InputFile, Sampling]]) -> list[MediaTask]:
    """Group media, each once: small files together, large ones alone."""
    tasks: list[MediaTask] = []
    group: list[tuple[InputFile, Sampling]] = []
    weight = 0
    for file, sampling in dict.fromkeys(media):
        size = 0
        with suppress(OSError):
            size = file.path.stat().st_size
        if group and (weight + size > TASK_BYTES or len(group) >= TASK_FILES):
            tasks.append(MediaTask(tuple(group), weight))
            group, weight = [], 0
        group.append((file, sampling))
        weight += size
    if group:
        tasks.append(MediaTask(tuple(group), weight))
    return tasks


@dataclass(frozen=True, slots=True)
class SampleFrames:
    """Puts frames on disk, for a codebook to be fitted on."""

    store: MediaStore

    def __call__(self, task: MediaTask) -> None:
        """Sample a task's media; one that cannot be used is refused with its example."""
        for file, sampling in task.media:
            with suppress(DataError):
                self.store.spool(file, sampling)


@dataclass(frozen=True, slots=True)
class EncodeMedia:
    """Puts codes into the store."""

    store: MediaStore

    def __call__(self, task: MediaTask) -> None:
        """Encode a task's media; one that cannot be used is refused with its example."""
        for file, sampling in task.media:
            with suppress(DataError):
                self.store.codes(file, sampling)
