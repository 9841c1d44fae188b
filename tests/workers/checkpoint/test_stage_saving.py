"""A stage that saves: busy, failing, fenced off and short of memory, on real stores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import checkpoint_jobs
import pytest
import torch
from torch import nn

from ringworld_workers.boundary import Boundary, agree
from ringworld_workers.checkpoint.background import NICENESS, Background
from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.checkpoint.fence import TakenOver
from ringworld_workers.checkpoint.layout import CheckpointError
from ringworld_workers.checkpoint.reader import load, read_manifest
from ringworld_workers.checkpoint.retention import leftovers
from ringworld_workers.checkpoint.snapshot import SnapshotBuffer
from ringworld_workers.checkpointing import StageCheckpoints
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import Mesh, build_mesh
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.file_store import FileStore
from ringworld_workers.store.opening import open_store

stage_job = partial(checkpoint_jobs.stage_job, keep=50)
STATE_BYTES = 3 * 4 * (3 * 50 + 50 + 50)


class Notes:
    """A reporter that keeps everything."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.phases: list[tuple[str, int]] = []

    def phase(self, name: str, step: int) -> None:
        self.phases.append((name, step))

    def metrics(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def event(self, record: dict[str, Any]) -> None:
        self.records.append({"event": record["kind"], **record})

    def should_stop(self) -> bool:
        return False

    def position(self) -> int:
        return len(self.records)

    def stored(self, position: int) -> bool:
        return True

    def saved(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == "checkpoint" and "event" not in r]


class Stage:
    """A stage's loop around a small module."""

    def __init__(
        self, job: StageJob, mesh: Mesh, store: Any = None, notes: Notes | None = None
    ) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 1, bias=False))
        self.mesh = mesh
        self.engine = build_engine("torch", module, job.spec.optimizer, job.stage, mesh)
        self.notes = notes or Notes()
        self.checkpoints = StageCheckpoints(job, mesh, self.engine, self.notes)
        if store is not None:
            self.checkpoints.store = self.checkpoints.writer._store = store
        self.start = self.checkpoints.restore()
        self.step = self.start.step

    def train(self) -> None:
        for _ in range(2 // self.mesh.world_size):
            self.engine.backward((self.engine(torch.ones(2, 3)) ** 2).sum())
        self.engine.step()
        self.step += 1
        self.checkpoints.note_step(self.step)

    def boundary(self, *, stop: bool = False) -> None:
        agreed: Boundary = agree(
            [],
            self.mesh.control_group,
            stop=stop,
            checkpoint_due=self.checkpoints.due(),
            uploads_pending=self.checkpoints.pending(),
        )
        self.checkpoints.at_boundary(agreed, self.step, self.step, lambda: None)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.engine.module.parameters()]


class HeldStore(FileStore):
    """Holds every streamed write back until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()

    def put(self, key: str, chunks: Iterable[Any]) -> None:
        assert self.go.wait(30)
        super().put(key, chunks)


def test_a_busy_store_has_checkpoints_left_out(tmp_path: Path, mesh: Mesh) -> None:
    store = HeldStore(tmp_path)
    stage = Stage(stage_job(store.url, when_busy="skip"), mesh, store)
    saved = []
    for _ in range(4):
        stage.train()
        stage.boundary()
        saved.append(stage.weights())
    assert [r["text"].partition(" is left out")[0] for r in stage.notes.records] == [
        f"the checkpoint due at step {step} of stage a" for step in (2, 3, 4)
    ]
    store.go.set()
    stage.checkpoints.writer.wait()
    stage.train()
    stage.boundary()  # all have uploaded: the manifest is written now, and the next save is due
    stage.checkpoints.writer.wait()
    assert [(ref.step) for ref in committed(store)] == [1]
    stage.boundary()
    (record,) = stage.notes.saved()
    assert (record["step"], record["skipped"], record["failed"]) == (1, 3, 0)
    assert stage.checkpoints.writer.in_flight, "the save that stayed due has begun"
    assert stage.checkpoints.stop(stage.step) is None
    assert [ref.step for ref in committed(store)] == [1, 5]
    stage.checkpoints.close()
    # What was saved is the state of its moment.
    load(store, committed(store)[0], stage.engine, mesh, with_optimizer=True)
    assert all(map(torch.equal, stage.weights(), saved[0]))


def test_a_busy_store_is_waited_for(tmp_path: Path, mesh: Mesh) -> None:
    store = HeldStore(tmp_path)
    stage = Stage(stage_job(store.url, when_busy="wait"), mesh, store)
    stage.train()
    stage.boundary()
    stage.train()
    timer = threading.Timer(0.3, store.go.set)
    timer.start()
    stage.boundary()
    assert [ref.step for ref in committed(store)] == [1]
    stage.checkpoints.save_last(2, 2, bookmark=None, metrics={})
    stage.checkpoints.close()
    first, again, last = stage.notes.saved()
    assert first["waited_seconds"] > 0.1 and first["skipped"] == 0
    assert again["step"] == last["step"] == 2, "a stage's end is saved with its scores"
    assert last["bytes"] == STATE_BYTES and last["stall_seconds"] < first["waited_seconds"]
    assert last["bytes_per_second"] == STATE_BYTES / last["upload_seconds"]
    assert read_manifest(store, committed(store)[-1]).run_uid == "uid-1"


def test_saves_fail_while_the_bucket_is_gone(s3_url: str, mesh: Mesh) -> None:
    client = boto3.client("s3")
    bucket = s3_url.rpartition("/")[2]
    client.create_bucket(Bucket=bucket)
    stage = Stage(stage_job(f"s3://{bucket}/run", max_failures=3), mesh)
    for item in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=item["Key"])
    client.delete_bucket(Bucket=bucket)
    for _ in range(3):
        stage.train()
        stage.boundary()
    failed = [r for r in stage.notes.records if r["kind"] == "checkpoint_failed" and "step" in r]
    assert [(r["step"], r["failed_in_row"]) for r in failed] == [(1, 1), (2, 2)]
    client.create_bucket(Bucket=bucket)
    stage.checkpoints.writer.wait()  # the third may have come late enough to succeed
    stage.train()
    stage.boundary()
    stage.checkpoints.save_last(5, 5, bookmark=None, metrics={})
    saved = stage.notes.saved()
    assert saved[-1]["step"] == 5 and saved[-1]["failed"] in (2, 3)
    # The count begins anew after a success.
    assert [ref.step for ref in committed(stage.checkpoints.store)][-1] == 5
    stage.checkpoints.close()


class Blocked(Notes):
    """Takes the file that is in the way of a save away once so many have failed."""

    def __init__(self, obstacle: Path, after: int) -> None:
        super().__init__()
        self._obstacle, self._after = obstacle, after

    def metrics(self, record: dict[str, Any]) -> None:
        super().metrics(record)
        if record.get("failed_in_row") == self._after:
            self._obstacle.unlink()


@pytest.mark.parametrize(("heals_after", "saved"), [(2, True), (4, False)])
def test_the_end_of_a_stage_is_saved_as_soon_as_the_store_is_well(
    tmp_path: Path, mesh: Mesh, heals_after: int, saved: bool
) -> None:
    obstacle = tmp_path / "run/00-a"
    notes = Blocked(obstacle, heals_after)
    stage = Stage(stage_job(f"file://{tmp_path}/run", max_failures=2), mesh, notes=notes)
    obstacle.touch()
    stage.train()
    if saved:
        stage.checkpoints.save_last(1, 1, bookmark=None, metrics={})
        assert [(r["step"], r["failed"]) for r in stage.notes.saved()] == [(1, 2)]
    else:
        with pytest.raises(CheckpointError, match="last checkpoint of stage a.*a part of the path"):
            stage.checkpoints.save_last(1, 1, bookmark=None, metrics={})
        assert len([r for r in stage.notes.records if "failed_in_row" in r]) == 3
    stage.checkpoints.close()


def test_the_gang_that_was_taken_over_says_so_and_commits_nothing(
    tmp_path: Path, mesh: Mesh
) -> None:
    url = f"file://{tmp_path}/checkpoints"
    old = Stage(stage_job(url, max_failures=9), mesh)
    old.train()
    old.boundary()
    new = Stage(stage_job(url, attempt=2), mesh)
    assert new.start.step == 0
    old.train()
    with pytest.raises(TakenOver, match="step-00000001 is not committed; attempt 2 on .* has"):
        old.boundary()
    assert committed(open_store(url)) == []
    assert not old.notes.records, "it is no save that failed"
    new.train()
    new.train()
    new.boundary()
    assert new.checkpoints.stop(2) is None
    old.checkpoints.close()
    new.checkpoints.close()
    assert [ref.step for ref in committed(open_store(url))] == [2]
    assert [left.kind for left in leftovers(open_store(url))] == ["uncommitted"]
    with pytest.raises(CheckpointError, match="attempt 2 on .* has taken over"):
        Stage(stage_job(url), mesh)


def save_piecewise(
    rank: int, world_size: int, url: str, environment: dict[str, str]
) -> tuple[list[str], list[Any]]:
    os.environ.update(environment)  # that of the ranks' parent is older than the server
    mesh = build_mesh(1, world_size)
    stage = Stage(stage_job(url, world_size=world_size, max_host_bytes=400), mesh)
    for _ in range(2):
        stage.train()
        stage.boundary()
    assert not stage.checkpoints.writer._save.upload.busy, "the step has waited"
    stage.checkpoints.save_last(3, 3, bookmark=None, metrics={})
    expected = stage.weights()
    assert stage.checkpoints.writer._buffer._memory.numel() == 100
    store = stage.checkpoints.store
    load(store, committed(store)[-1], stage.engine, mesh, with_optimizer=True)
    assert all(map(torch.equal, stage.weights(), expected))
    stage.checkpoints.close()
    return [r["text"] for r in stage.notes.records if r.get("event")], stage.notes.saved()


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_small_buffer_saves_piece_by_piece(
    kind: str, request: pytest.FixtureRequest, run_gang: Callable[..., list[Any]], tmp_path: Path
) -> None:
    url = request.getfixturevalue("s3_url") if kind == "s3" else f"file://{tmp_path}"
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    (texts, saved), (other, _) = run_gang(save_piecewise, 2, url, aws)
    (text,) = texts
    assert text.endswith("(4 of them), and the step waits for the whole upload; to save in the "
                         "background, give at least 1500")  # fmt: skip
    assert other == [] and [record["step"] for record in saved] == [1, 2, 3]
    store = open_store(url)
    manifest = read_manifest(store, committed(store)[-1])
    assert [stored.size for stored in manifest.objects] == 2 * [400, 400, 400, 300]


def test_memory_is_there_before_the_first_save(tmp_path: Path, mesh: Mesh) -> None:
    stage = Stage(stage_job(f"file://{tmp_path}"), mesh)
    memory = stage.checkpoints.writer._buffer._memory
    assert memory.numel() * 4 == STATE_BYTES
    stage.train()
    stage.boundary()
    assert stage.checkpoints.writer._buffer._memory is memory
    stage.checkpoints.stop(1)
    stage.checkpoints.close()


@pytest.mark.parametrize("limit", [4, 12, 400, 999, 4000, 10**9])
def test_pieces_cover_every_range_once(limit: int, mesh: Mesh) -> None:
    stage = stage_job("file:///nowhere")
    module = nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 1, bias=False))
    engine = build_engine("torch", module, stage.spec.optimizer, stage.stage, mesh)
    ranges = engine.owned_ranges()
    buffer = SnapshotBuffer(limit)
    found: dict[tuple[str, str], list[float]] = {}
    for piece in buffer.pieces(ranges):
        taken = buffer.take(piece)
        assert 0 < len(taken.buffer) <= max(4, limit)
        values = torch.frombuffer(bytearray(taken.buffer), dtype=torch.float32).tolist()
        for tensor, kind, start, numel in taken.places:
            held = found.setdefault((tensor, kind), [])
            assert start == len(held)
            held += [values.pop(0) for _ in range(numel)]
    assert found == {(r.tensor, r.kind): r.data.tolist() for r in ranges}
    if limit < STATE_BYTES:
        with pytest.raises(ValueError, match=f"{STATE_BYTES} bytes do not fit a snapshot"):
            buffer.take(ranges)


def test_uploads_give_way_to_training() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    assert Background("test", niceness).result == min(19, before + NICENESS)
    assert Background("test", niceness, yields=False).result == before
    assert niceness() == before
    failing = Background("test", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        _ = failing.result
    assert not failing.busy
