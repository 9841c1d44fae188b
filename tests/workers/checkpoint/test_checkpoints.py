"""Saving, committing, finding, refusing and forgetting checkpoints, on the plain torch engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_jobs import make_engine, state_at

from ringworld_jobs.spec import CheckpointSpec
from ringworld_workers.checkpoint.catalog import committed, newest
from ringworld_workers.checkpoint.layout import (
    CheckpointError,
    CheckpointRef,
    TrainState,
    folder_of,
    parse_folder,
)
from ringworld_workers.checkpoint.publish import publish
from ringworld_workers.checkpoint.reader import load, read_manifest
from ringworld_workers.checkpoint.writer import CheckpointWriter
from ringworld_workers.mesh import Mesh, build_mesh
from ringworld_workers.store.base import StoreError
from ringworld_workers.store.file_store import FileStore
from ringworld_workers.store.opening import open_store


def train(engine: Any) -> None:
    engine.backward((engine(torch.ones(2, 3)) ** 2).sum() * engine.loss_factor)
    engine.step()


def job(attempt: int = 1, keep: int = 2) -> Any:
    return SimpleNamespace(
        run_id="run-1",
        run_uid="uid-1",
        attempt=attempt,
        stage_index=0,
        spec=SimpleNamespace(checkpoint=CheckpointSpec(keep=keep)),
    )


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "checkpoints")


def save(store: Any, mesh: Mesh, engine: Any, state: TrainState, **of_job: int) -> dict[str, Any]:
    writer = CheckpointWriter(store, mesh, job(**of_job))
    writer.snapshot(engine, state)
    result = writer.commit()
    writer.close()
    return result


def only(store: Any, suffix: str) -> str:
    (key,) = [info.key for info in store.list() if info.key.endswith(suffix)]
    return key


# Saving.


class HeldStore(FileStore):
    """Holds every streamed write back until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()

    def put(self, key: str, chunks: Iterable[Any]) -> None:
        assert self.go.wait(30)
        super().put(key, chunks)


def test_the_snapshot_is_of_its_moment(tmp_path: Path, mesh: Mesh) -> None:
    store = HeldStore(tmp_path)
    engine = make_engine(mesh)
    train(engine)
    then = weights(engine)
    writer = CheckpointWriter(store, mesh, job())
    assert (writer.in_flight, writer.uploading()) == (False, False)
    writer.snapshot(engine, state_at(1))
    assert (writer.in_flight, writer.uploading()) == (True, True)
    with pytest.raises(RuntimeError, match="step 1 is in flight; commit it"):
        writer.snapshot(engine, state_at(2))
    train(engine)
    assert newest(store) is None
    store.go.set()
    writer.wait()
    assert not writer.uploading()
    assert writer.in_flight and newest(store) is None, "uploaded is not committed"
    result = writer.commit()
    assert not writer.in_flight
    assert result["key"] == "00-s0/step-00000001" and result["step"] == 1
    assert result["bytes"] == 3 * 4 * sum(tensor.numel() for tensor in then.values())
    assert result["upload_seconds"] > 0 and result["stall_seconds"] > 0
    fresh = make_engine(mesh, seed=9)
    ref = newest(store)
    assert ref is not None
    assert load(store, ref, fresh, mesh, with_optimizer=True) == state_at(1)
    assert same(weights(fresh), then) and not same(weights(engine), then)
    with pytest.raises(RuntimeError, match="no checkpoint is in flight"):
        writer.commit()


def test_host_memory_is_used_again(store: FileStore, mesh: Mesh) -> None:
    engine = make_engine(mesh)
    writer = CheckpointWriter(store, mesh, job())
    places = set()
    for step in (1, 2, 3):
        train(engine)
        writer.snapshot(engine, state_at(step))
        places.add(writer._buffer._memory.data_ptr())
        writer.commit()
    writer.close()
    assert len(places) == 1


class FailingStore(FileStore):
    """Refuses streamed writes of some ranks."""

    def __init__(self, root: Path, needle: str) -> None:
        super().__init__(root)
        self.needle = needle

    def put(self, key: str, chunks: Iterable[Any]) -> None:
        if self.needle in key:
            raise StoreError("put", key, "the disk is full")
        super().put(key, chunks)


def save_with_a_bad_rank(rank: int, world_size: int, folder: str) -> tuple[str, list[str]]:
    mesh = build_mesh(1, world_size)
    store = FailingStore(Path(folder), "rank-00001")
    writer = CheckpointWriter(store, mesh, job())
    engine = make_engine(mesh)
    writer.snapshot(engine, state_at(1))
    message = ""
    try:
        writer.commit()
    except CheckpointError as error:
        message = str(error)
    dist.barrier(group=mesh.control_group)
    seen = [ref.key for ref in committed(store)]
    # The next checkpoint is not held up by the failed one.
    writer._store = FileStore(Path(folder))
    writer.snapshot(engine, state_at(2))
    seen.append(writer.commit()["key"])
    writer.close()
    return message, seen


def test_one_failed_rank_fails_the_commit_on_all(
    run_gang: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for message, seen in run_gang(save_with_a_bad_rank, 2, str(tmp_path)):
        assert "step-00000001 is not committed; rank 1: put" in message
        assert "the disk is full" in message
        assert seen == ["00-s0/step-00000002"]
    store = FileStore(tmp_path)
    left = {info.key.rpartition("/")[0] for info in store.list()} - {""}
    assert left == {"00-s0/step-00000002"}, "what the failed save left is cleaned up by the next"


def test_saving_a_step_again_replaces_it(store: FileStore, mesh: Mesh) -> None:
    engine = make_engine(mesh)
    save(store, mesh, engine, state_at(1))
    first = only(store, ".bin")
    train(engine)
    save(store, mesh, engine, state_at(1, final=True))
    (ref,) = committed(store)
    (second,) = read_manifest(store, ref).objects
    assert first != second.key
    fresh = make_engine(mesh, seed=9)
    state = load(store, ref, fresh, mesh, with_optimizer=True)
    assert state.final and same(weights(fresh), weights(engine))


def test_the_same_manifest_twice_is_no_error(store: FileStore, mesh: Mesh) -> None:
    """As when the reply to the first try was lost."""
    save(store, mesh, make_engine(mesh), state_at(1))
    (ref,) = committed(store)
    manifest = read_manifest(store, ref)
    publish(store, f"{ref.key}/manifest.json", manifest)
    assert read_manifest(store, ref) == manifest
    assert only(store, ".bin") == manifest.objects[0].key


def test_what_was_removed_meanwhile_is_not_committed(store: FileStore, mesh: Mesh) -> None:
    """As by a clean-up that took it for a leftover."""
    writer = CheckpointWriter(store, mesh, job())
    writer.snapshot(make_engine(mesh), state_at(1))
    writer.wait()
    store.delete(only(store, ".bin"))
    with pytest.raises(CheckpointError, match="is not committed; .* holds no bytes instead of"):
        writer.commit()
    writer.close()
    assert committed(store) == []


def test_a_gang_that_should_be_dead_commits_nothing(store: FileStore, mesh: Mesh) -> None:
    save(store, mesh, make_engine(mesh), state_at(1), attempt=2)
    before = store.list()
    with pytest.raises(CheckpointError, match="attempt 2 on .* has taken over .* from attempt 1"):
        save(store, mesh, make_engine(mesh), state_at(1), attempt=1)
    fresh = make_engine(mesh, seed=9)
    load(store, committed(store)[0], fresh, mesh, with_optimizer=True)
    assert {info.key for info in before} <= {info.key for info in store.list()}


# Finding and forgetting.


def put_fake(store: FileStore, stage_index: int, step: int, *, manifest: bool = True) -> None:
    folder = folder_of(stage_index, f"s{stage_index}", step)
    store.put(f"{folder}/rank-00000-x.bin", [b"x"])
    if manifest:
        store.put(f"{folder}/manifest.json", [b"{}"])


def test_the_newest_is_of_the_highest_stage(store: FileStore) -> None:
    assert newest(store) is None
    for stage_index, step in ((0, 900), (0, 90), (1, 5), (10, 1)):
        put_fake(store, stage_index, step)
    put_fake(store, 11, 1, manifest=False)
    store.put("notes/manifest.json", [b"{}"])
    found = [(ref.stage_index, ref.step) for ref in committed(store)]
    assert found == [(0, 90), (0, 900), (1, 5), (10, 1)]
    assert newest(store) == CheckpointRef(store.url, "s10", 10, 1, "10-s10/step-00000001")


def test_folder_names_round_trip() -> None:
    for place in ((0, "a", 0), (7, "32k-x-1", 123456789), (100, "b.c", 5)):
        assert parse_folder(folder_of(*place)) == place
    assert parse_folder("00-a/step-x") is None
    assert parse_folder("") is None


def test_the_writer_keeps_what_the_spec_says(store: FileStore, mesh: Mesh) -> None:
    engine = make_engine(mesh)
    for step in range(1, 6):
        save(store, mesh, engine, state_at(step), keep=3)
    assert [ref.step for ref in committed(store)] == [3, 4, 5]


def test_a_saved_checkpoint_is_found_by_its_url(store: FileStore, mesh: Mesh) -> None:
    save(store, mesh, make_engine(mesh), state_at(1))
    (saved,) = committed(store)
    assert newest(open_store(saved.url)) == saved
    held = store.get(f"{saved.key}/manifest.json")
    assert read_manifest(store, saved).to_json() == held
