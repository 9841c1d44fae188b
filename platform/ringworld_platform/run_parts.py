"""A run's logs in its store: pieces that are written once, and put together again elsewhere.

A log only grows, and so does its copy: each piece is an object of its own, named for where in the
log it begins and for who wrote it, the count of controllers that had taken the run by then. A
controller that has lost the run without knowing may still write a piece; whoever took the run over
has written one from the same place on, or from before it, and later writers prevail.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ringworld_platform.evaluation_records import (
    EVALUATIONS_FOLDER,
    answers_files,
    is_answers_file,
)
from ringworld_platform.rank_logs import LOGS_FOLDER, is_rank_log
from ringworld_platform.run_folder import SAMPLES_FILE
from ringworld_platform.run_records import EVENTS_FILE, METRICS_FILE
from ringworld_workers.store.base import Store

RECORDS = "records"
WHOLE = "whole"
PART_BYTES = 8 << 20
WHOLE_BYTES = 16 << 20
_READERS = 8
_PART = re.compile(r"(?P<stem>.+)-(?P<epoch>\d{4,})-(?P<offset>\d{12,})(?P<suffix>\.[a-z]+)")
# What is written once or replaced, rather than added to.
_WHOLE = ("mlflow.json", "parity.json")
_WHOLE_FOLDERS = ("evidence", "stacks", EVALUATIONS_FOLDER)


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """A piece of a log.

    Attributes:
        name: of the log in the run's folder, such as ``logs/rank-0.log``.
        epoch: of the controller that wrote it.
        offset: byte of the log at which it begins.
        size: its bytes.
    """

    name: str
    epoch: int
    offset: int
    size: int = 0

    @property
    def key(self) -> str:
        """Its object, in the run's part of the store."""
        stem, dot, suffix = self.name.rpartition(".")
        return f"{RECORDS}/{stem}-{self.epoch:04d}-{self.offset:012d}{dot}{suffix}"

    @classmethod
    def parse(cls, key: str, size: int) -> Self | None:
        """The piece that an object is; None where it is none."""
        found = _PART.fullmatch(key.removeprefix(f"{RECORDS}/"))
        if found is None or not is_log(name := found["stem"] + found["suffix"]):
            return None
        return cls(name, int(found["epoch"]), int(found["offset"]), size)


def is_log(name: str) -> bool:
    """Whether a file of a run's folder only ever grows, by whole lines."""
    folder, _, file = name.rpartition("/")
    if folder == LOGS_FOLDER:
        return is_rank_log(file)
    return name in (METRICS_FILE, EVENTS_FILE, SAMPLES_FILE) or is_answers_file(name)


def logs_in(folder: Path) -> list[str]:
    """The logs that a run's folder has; the metric log last, so that it is never ahead."""
    ranks = sorted(f"{LOGS_FOLDER}/{path.name}" for path in (folder / LOGS_FOLDER).glob("*.log"))
    found = [*ranks, EVENTS_FILE, SAMPLES_FILE, *answers_files(folder), METRICS_FILE]
    return [name for name in found if is_log(name) and (folder / name).is_file()]


def whole_files(folder: Path) -> list[str]:
    """The other small files of a run's folder that are worth keeping."""
    below = [path for name in _WHOLE_FOLDERS for path in sorted((folder / name).rglob("*"))]
    found = []
    for path in [*(folder / name for name in _WHOLE), *below]:
        with contextlib.suppress(OSError):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and path.stat().st_size <= WHOLE_BYTES and not is_log(name):
                found.append(name)
    return found


def lengths(parts: Iterable[Part]) -> dict[str, int]:
    """How many bytes of each log its pieces make."""
    ends: dict[str, int] = {}
    for part in standing(parts):
        ends[part.name] = part.offset + part.size
    return ends


def find_parts(store: Store, run_id: str) -> list[Part]:
    """Every piece of a run's logs.

    Args:
        store: of the job.
        run_id: the run; its objects lie under this prefix.

    Raises:
        StoreError: the store failed.
    """
    found = []
    for info in store.list(f"{run_id}/{RECORDS}"):
        part = Part.parse(info.key.removeprefix(f"{run_id}/"), info.size)
        if part is not None:
            found.append(part)
    return found


def pull(store: Store, run_id: str, folder: Path) -> None:
    """Bring a run's folder up to what its store holds.

    A log that is longer here stays as it is, if it begins as the one in the store: its last lines
    had not been copied. One that went another way is replaced.

    Args:
        store: of the job.
        run_id: the run.
        folder: the run's; it must exist.

    Raises:
        StoreError: the store failed.
        OSError: the folder cannot be written.
    """
    parts = standing(find_parts(store, run_id))
    with ThreadPoolExecutor(_READERS) as pool:
        pieces = list(pool.map(lambda part: store.get(f"{run_id}/{part.key}"), parts))
    logs: dict[str, bytearray] = {}
    for part, piece in zip(parts, pieces, strict=True):
        log = logs.setdefault(part.name, bytearray())
        del log[part.offset :]
        log += piece
    for name, data in logs.items():
        _put_log(folder / name, bytes(data))
    for name, key in _newest_whole(store, run_id).items():
        _replace(folder / name, store.get(key))


def whole_key(name: str, epoch: int) -> str:
    """Object of a file that is no log, in the run's part of the store."""
    return f"{RECORDS}/{WHOLE}/{epoch:04d}/{name}"


def _newest_whole(store: Store, run_id: str) -> dict[str, str]:
    found = {}
    for info in store.list(f"{run_id}/{RECORDS}/{WHOLE}"):
        name = info.key.split("/", 4)[4]
        if name in _WHOLE or name.partition("/")[0] in _WHOLE_FOLDERS:
            found[name] = info.key  # sorted by key: later epochs come later
    return found


def standing(parts: Iterable[Part]) -> list[Part]:
    """The pieces that count, in order, without gaps."""
    kept: dict[str, list[Part]] = {}
    for part in sorted(parts):
        mine = kept.setdefault(part.name, [])
        while mine and mine[-1].offset >= part.offset:
            mine.pop()
        end = mine[-1].offset + mine[-1].size if mine else 0
        if part.offset <= end:
            mine.append(part)
    return [part for mine in kept.values() for part in mine]


def _put_log(path: Path, data: bytes) -> None:
    try:
        if path.stat().st_size >= len(data) and path.read_bytes().startswith(data):
            return
    except FileNotFoundError:
        pass
    _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_bytes(data)
    scratch.replace(path)
