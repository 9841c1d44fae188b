"""Comparing finds every element that differs, whatever ranks wrote which part of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringworld_workers.checkpoint.layout import CheckpointRef, DamagedCheckpoint, GroupState
from ringworld_workers.checkpoint_tools import diff as module
from ringworld_workers.checkpoint_tools.choose import manifest_of
from ringworld_workers.checkpoint_tools.diff import Difference, bytes_to_read, diff
from ringworld_workers.store.file_store import FileStore

BIG = np.linspace(-1, 1, 70_001, dtype=np.float32)
TENSORS = {"big": BIG, "small": np.arange(12.0).reshape(3, 4), "none": np.zeros((0, 4))}
Write = Callable[..., Any]


@pytest.fixture
def stores(tmp_path: Path) -> tuple[FileStore, FileStore]:
    return FileStore(tmp_path / "a"), FileStore(tmp_path / "b")


def compare(
    stores: tuple[FileStore, FileStore], refs: tuple[CheckpointRef, CheckpointRef]
) -> Difference:
    read: list[int] = []
    found = diff(stores, refs, read.append)
    assert sum(read) == bytes_to_read(
        manifest_of(stores[0], refs[0]), manifest_of(stores[1], refs[1])
    )
    return found


def test_meshes_and_runs_do_not_matter(
    stores: tuple[FileStore, FileStore], write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces that begin and end within ranges and chunks.
    monkeypatch.setattr(module, "_PIECE_NUMEL", 9_973)
    monkeypatch.setattr(module, "_STEP_NUMEL", 1_000)
    first = write_checkpoint(stores[0], TENSORS, ranks=1)
    second = write_checkpoint(stores[1], TENSORS, ranks=3, run_id="other-7", name="ffff0000")
    found = compare(stores, (first, second))
    assert found.equal and found.num_equal == 6

    changed = BIG.copy()
    changed[[0, 20_000, 70_000]] += np.float32(0.5)
    second = write_checkpoint(stores[1], TENSORS | {"big": changed}, ranks=2)
    found = compare(stores, (first, second))
    assert [(row.kind, row.num_different) for row in found.tensors] == [
        ("param", 3),
        ("exp_avg", 3),
        ("exp_avg_sq", 3),
    ]
    weights = found.tensors[0]
    assert weights.max_abs == pytest.approx(0.5, rel=1e-6)
    assert weights.relative == pytest.approx(0.5 / 1.5, rel=1e-6)
    assert (weights.numel, found.num_equal, found.values, found.shapes) == (70_001, 3, (), ())


def test_zeros_of_two_signs_differ_and_equal_nans_do_not(
    stores: tuple[FileStore, FileStore], write_checkpoint: Write
) -> None:
    first = write_checkpoint(stores[0], {"w": [0.0, math.nan, 1.0]})
    second = write_checkpoint(stores[1], {"w": [-0.0, math.nan, 1.0]})
    (weights, *_) = compare(stores, (first, second)).tensors
    assert (weights.kind, weights.num_different, weights.max_abs) == ("param", 1, 0.0)
    second = write_checkpoint(stores[1], {"w": [0.0, math.nan, math.nan]})
    (weights, *_) = compare(stores, (first, second)).tensors
    assert weights.num_different == 1 and math.isnan(weights.max_abs)


def test_state_optimizer_and_shapes_are_compared(
    stores: tuple[FileStore, FileStore], write_checkpoint: Write
) -> None:
    first = write_checkpoint(stores[0], {"w": [1.0], "left": [2.0], "bent": np.ones((2, 3))})
    second = write_checkpoint(
        stores[1], {"w": [1.0], "right": [2.0], "bent": np.ones((3, 2))}, step=9, final=True
    )
    key = f"{second.key}/manifest.json"
    manifest = manifest_of(stores[1], second)
    groups = (GroupState("decay", 1e-4, 0.1), manifest.optimizer.groups[1])
    optimizer = dataclasses.replace(manifest.optimizer, groups=groups)
    stores[1].put(key, [dataclasses.replace(manifest, optimizer=optimizer).to_json()])
    found = compare(stores, (first, second))
    values = {change.name: (change.first, change.second) for change in found.values}
    assert values == {
        "step": (8, 9),
        "tokens": (8192, 9216),
        "cursor": (32, 36),
        "final": (False, True),
        "optimizer.step": (8, 9),
        "optimizer.decay.learning_rate": (1e-3, 1e-4),
    }
    shapes = {change.name: (change.first, change.second) for change in found.shapes}
    assert shapes == {"left": ((1,), None), "right": (None, (1,)), "bent": ((2, 3), (3, 2))}
    assert not found.tensors and found.num_equal == 3 and not found.equal


def test_a_damaged_one_is_no_difference(
    stores: tuple[FileStore, FileStore], write_checkpoint: Write
) -> None:
    refs = [write_checkpoint(store, TENSORS) for store in stores]
    held = manifest_of(stores[1], refs[1]).objects[0]
    path = stores[1].root / held.key
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(DamagedCheckpoint, match="the checksum of bytes 0 to"):
        diff(stores, (refs[0], refs[1]))
