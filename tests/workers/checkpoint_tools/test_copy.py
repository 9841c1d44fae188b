"""Copies are whole or not there, go on where they were cut, and replace nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.checkpoint.layout import CheckpointError, CheckpointRef, DamagedCheckpoint
from ringworld_workers.checkpoint_tools.choose import manifest_of
from ringworld_workers.checkpoint_tools.copy import Copied, copy_checkpoint, copy_records
from ringworld_workers.checkpoint_tools.verify import verify
from ringworld_workers.store.base import Store
from ringworld_workers.store.file_store import FileStore
from ringworld_workers.store.opening import open_store

TENSORS = {"big": np.arange(900_000, dtype=np.float32), "small": np.ones((3, 7))}
Write = Callable[..., Any]


@pytest.fixture
def source(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "runs" / "quickstart-1" / "checkpoints")


@pytest.fixture
def target(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "backup" / "quickstart-1" / "checkpoints")


def content(store: Store, ref: CheckpointRef) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list(ref.key)}


def test_to_a_bucket_and_back(
    source: FileStore, target: FileStore, s3_url: str, write_checkpoint: Write
) -> None:
    bucket = open_store(f"{s3_url}/quickstart-1/checkpoints")
    ref = write_checkpoint(source, TENSORS)
    size = sum(stored.size for stored in manifest_of(source, ref).objects)
    seen: list[int] = []
    assert copy_checkpoint(source, ref, bucket, seen.append) == Copied(2, 0, size)
    assert sum(seen) == size and verify(bucket, ref).sound
    assert copy_checkpoint(bucket, ref, target) == Copied(2, 0, size)
    assert content(target, ref) == content(source, ref) == content(bucket, ref)
    # Again: everything is there, and was read to see that.
    seen.clear()
    assert copy_checkpoint(source, ref, bucket, seen.append) == Copied(0, 2, 0)
    assert sum(seen) == size


class Interrupted(FileStore):
    """Ctrl-C, as the second object is on its way."""

    def put(self, key: str, chunks: Iterable[Any]) -> None:
        if "rank-00001" in key:
            next(iter(chunks))
            raise KeyboardInterrupt
        super().put(key, chunks)


def test_it_goes_on_where_it_was_cut(
    source: FileStore, target: FileStore, write_checkpoint: Write
) -> None:
    ref = write_checkpoint(source, TENSORS, ranks=3)
    with pytest.raises(KeyboardInterrupt):
        copy_checkpoint(source, ref, Interrupted(target.root))
    assert committed(target) == []
    first, second, third = manifest_of(source, ref).objects
    # What is there by then depends on the threads; what has a wrong byte is written anew.
    target.put(first.key, [source.get(first.key)])
    target.put(third.key, [bytes(third.size)])
    done = copy_checkpoint(source, ref, target)
    assert done == Copied(2, 1, second.size + third.size)
    assert content(target, ref) == content(source, ref)


def test_damage_is_not_copied(
    source: FileStore, target: FileStore, write_checkpoint: Write
) -> None:
    ref = write_checkpoint(source, TENSORS)
    held = manifest_of(source, ref).objects[1]
    path = source.root / held.key
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedCheckpoint, match=r"rank-00001.* is damaged: bytes .* of small"):
        copy_checkpoint(source, ref, target)
    assert committed(target) == [] and not list(target.unfinished())


def test_another_checkpoint_is_not_replaced(
    source: FileStore, target: FileStore, write_checkpoint: Write
) -> None:
    ref = write_checkpoint(source, TENSORS)
    write_checkpoint(target, {"w": [1.0]}, name="ffff0000")
    before = content(target, ref)
    with pytest.raises(CheckpointError, match="is that of another checkpoint"):
        copy_checkpoint(source, ref, target)
    assert content(target, ref) == before


def test_a_runs_spec_and_claim_go_along(tmp_path: Path) -> None:
    run, copy, other = (FileStore(tmp_path / name) for name in ("run", "copy", "other"))
    run.put("spec.yaml", [b"name: quickstart"])
    run.put("run.json", [b'{"uid": "1"}'])
    other.put("run.json", [b'{"uid": "2"}'])
    copy_records(run, copy)
    copy_records(run, copy)
    assert [info.key for info in copy.list()] == ["run.json", "spec.yaml"]
    with pytest.raises(CheckpointError, match=r"is of another run: its run\.json differs"):
        copy_records(run, other)
    assert [info.key for info in other.list()] == ["run.json"]
