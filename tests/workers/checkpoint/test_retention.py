"""What stays, what goes, and what is never touched, on real files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.checkpoint.fence import WRITER, Fence
from ringworld_workers.checkpoint.layout import (
    SET_ASIDE,
    Manifest,
    OptimizerState,
    StoredObject,
    StoredRange,
    TrainState,
    folder_of,
    parameter_digest,
)
from ringworld_workers.checkpoint.retention import leftovers, prune
from ringworld_workers.checkpoint.save_id import SaveId
from ringworld_workers.store.base import StoreError
from ringworld_workers.store.file_store import FileStore

NOW = time.time()


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "checkpoints")


def put(store: FileStore, key: str, data: bytes = b"four", *, age: float = 0.0) -> str:
    store.put(key, [data])
    os.utime(store.root / key, (NOW - age, NOW - age))
    return key


def commit(store: FileStore, stage_index: int, step: int, *, age: float = 0.0) -> str:
    folder = folder_of(stage_index, f"s{stage_index}", step)
    held = put(store, f"{folder}/rank-00000-x.bin", age=age)
    state = TrainState(
        stage=f"s{stage_index}",
        stage_index=stage_index,
        step=step,
        tokens=0,
        cursor=0,
        rng=None,
        learning_rate=0.1,
        spec_digest="d",
        metrics={},
        final=False,
    )
    objects = (StoredObject(held, 4, (StoredRange("w", "param", 0, 1, 0, 4, "float32", (1,)),)),)
    manifest = Manifest(
        run_id="r",
        attempt=1,
        world_size=1,
        mesh={"data_parallel": 1, "heads": 1, "sequence_parallel": 1},
        parameter_digest=parameter_digest({"w": (1,)}),
        tensors={"w": (1,)},
        objects=objects,
        optimizer=OptimizerState("sgd", 0, ()),
        state=state,
    )
    key = f"{folder}/manifest.json"
    put(store, key, manifest.to_json(), age=age)
    Manifest.from_json(store.get(key), key)
    return folder


def places(store: FileStore) -> list[tuple[int, int]]:
    return [(ref.stage_index, ref.step) for ref in committed(store)]


def three_stages(store: FileStore) -> None:
    for stage_index, steps in ((0, (1, 2, 3)), (1, (1, 2)), (2, (1, 2, 3, 4))):
        for step in steps:
            commit(store, stage_index, step)


def test_the_newest_stay_and_the_ends_of_stages(store: FileStore) -> None:
    three_stages(store)
    would = prune(store, 3, True, dry_run=True)
    assert {left.kind for left in would} == {"checkpoint"} and len(places(store)) == 9
    assert [left.key for left in prune(store, 3, True)] == [left.key for left in would]
    assert places(store) == [(0, 3), (1, 2), (2, 2), (2, 3), (2, 4)]
    assert prune(store, 3, True) == []
    prune(store, 1, True)
    assert places(store) == [(0, 3), (1, 2), (2, 3), (2, 4)], "the newest two stay"
    prune(store, 1, False)
    assert places(store) == [(2, 3), (2, 4)]
    assert len([info for info in store.list() if info.key.endswith(".bin")]) == 2


def test_the_newest_two_stay_over_the_border_of_a_stage(store: FileStore) -> None:
    for place in ((0, 1), (0, 2), (0, 3), (1, 1)):
        commit(store, *place)
    prune(store, 1, False)
    assert places(store) == [(0, 3), (1, 1)]


def test_the_manifest_goes_first(tmp_path: Path) -> None:
    class Dying(FileStore):
        def delete(self, key: str) -> None:
            if key.endswith(".bin"):
                raise StoreError("delete", key, "killed here")
            super().delete(key)

    store = Dying(tmp_path)
    for step in (1, 2, 3):
        commit(store, 0, step)
    with pytest.raises(StoreError, match="killed here"):
        prune(store, 1, True)
    assert places(store) == [(0, 2), (0, 3)]
    # What that clean-up has left goes with the next of a later gang.
    again = FileStore(tmp_path)
    Fence(again, run_uid="u", attempt=2, stage_index=0).take()
    os.utime(tmp_path / WRITER, (NOW + 5, NOW + 5))
    assert prune(again, 1, True) == [], "a commit of the gang before may be on its way"
    os.utime(tmp_path / "00-s0/step-00000003/manifest.json", (NOW + 700, NOW + 700))
    (left,) = prune(again, 1, True)
    assert (left.kind, left.key) == ("uncommitted", "00-s0/step-00000001")
    assert leftovers(again) == []


def fence_taken(store: FileStore, age: float) -> str:
    """The gang that writes took over so long ago; returns its token."""
    fence = Fence(store, run_uid="u", attempt=2, stage_index=1)
    fence.take()
    os.utime(store.root / WRITER, (NOW - age, NOW - age))
    return fence.record.token


def test_leftovers_go_once_no_one_can_be_writing_them(store: FileStore) -> None:
    token = fence_taken(store, age=1000)
    ours = [SaveId(token, number) for number in (1, 2, 3)]
    for step in (2, 4, 6):
        commit(store, 1, step, age=50)
    dead = [
        # Of gangs before this one, and overtaken; of our own first save, which failed.
        put(store, "00-s0/step-00000009/rank-00000-x.bin", age=2000),
        put(store, ours[0].key("01-s1/step-00000003", 1), age=60),
        # Beside the objects of a committed checkpoint.
        put(store, "01-s1/step-00000004/rank-00000-other.bin", age=2000),
        put(store, ours[1].key("01-s1/step-00000006", 0), age=40),
    ]
    alive = [
        # Not overtaken; of a gang that was hung and is not; our own save in flight.
        put(store, "01-s1/step-00000008/rank-00000-x.bin", age=2000),
        put(store, "01-s1/step-00000005/rank-00000-0123456789ab-0001.bin", age=10),
        put(store, ours[2].key("01-s1/step-00000006", 1), age=0),
        put(store, ours[2].key("01-s1/step-00000003", 0), age=0),
    ]
    # The folder of a failed save that is being written to again waits until that is decided.
    waiting = dead.pop(1)
    listed = {key for left in leftovers(store) for key in left.keys}
    assert listed == {*dead, *alive, waiting}
    removed = prune(store, 9, True, last=ours[1])
    assert {key for left in removed for key in left.keys} == set(dead)
    assert {info.key for info in store.list()} >= {*alive, waiting}
    # Once they are old enough all go, whoever wrote them.
    prune(store, 9, True, unfinished_seconds=-1.0)
    assert leftovers(store) == []
    assert places(store) == [(1, 2), (1, 4), (1, 6)]


def test_what_the_command_line_sees_of_a_busy_gang_stays(store: FileStore) -> None:
    token = fence_taken(store, age=1000)
    commit(store, 1, 2, age=50)
    commit(store, 1, 4, age=50)
    busy = put(store, SaveId(token, 7).key("01-s1/step-00000003", 0), age=10)
    assert prune(store, 9, True) == []
    assert store.get(busy) == b"four"


def test_unfinished_uploads_and_set_aside_manifests(store: FileStore) -> None:
    for step in (1, 2, 3):
        commit(store, 0, step, age=3000)
    folder = folder_of(0, "s0", 3)
    store.delete(f"{folder}/manifest.json")
    put(store, f"{folder}/{SET_ASIDE}", age=2500)
    hidden = store.root / folder_of(0, "s0", 4) / ".tmp-0123456789ab"
    hidden.parent.mkdir()
    hidden.write_bytes(b"half")
    os.utime(hidden, (NOW - 2000, NOW - 2000))
    kinds = [(left.kind, left.key, left.num_bytes) for left in leftovers(store)]
    assert kinds == [
        ("set aside", folder, 8),
        ("unfinished", "00-s0/step-00000004/.tmp-0123456789ab", 0),
    ]
    assert prune(store, 9, True) == [], "there is no telling who writes"
    fence_taken(store, age=1000)
    commit(store, 0, 5, age=500)
    assert prune(store, 9, True) == [], "a commit of the gang before may be on its way"
    commit(store, 0, 6, age=10)
    assert [left.kind for left in prune(store, 9, True)] == ["unfinished"]
    assert not hidden.exists()
    # Someone may want to look at what was damaged.
    assert prune(store, 9, True) == []
    assert [left.kind for left in prune(store, 9, True, unfinished_seconds=2200)] == ["set aside"]
    assert leftovers(store) == [] and places(store) == [(0, 1), (0, 2), (0, 5), (0, 6)]


def test_a_damaged_manifest_condemns_no_object(store: FileStore) -> None:
    for step in (1, 2, 3):
        commit(store, 0, step, age=3000)
    put(store, f"{folder_of(0, 's0', 2)}/manifest.json", json.dumps({}).encode(), age=3000)
    fence_taken(store, age=1000)
    commit(store, 0, 4)
    assert leftovers(store) == [] and prune(store, 9, True) == []


def test_names_tell_the_save() -> None:
    save = SaveId("0123456789ab", 12345)
    for piece in (None, 7):
        assert SaveId.of(save.key("00-a/step-00000001", 3, piece)) == save
    assert SaveId.of("00-a/step-00000001/rank-00000-leftover.bin") is None
