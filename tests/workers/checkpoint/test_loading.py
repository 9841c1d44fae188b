"""Reading checkpoints back: in place, verified, and never one that is damaged.

The checkpoints here are written by hand, as another program would.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from awscrt.checksums import crc32c
from checkpoint_jobs import make_engine, state_at
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_jobs.spec import CheckpointSpec
from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.checkpoint.layout import (
    CHUNK_BYTES,
    CheckpointError,
    CheckpointRef,
    DamagedCheckpoint,
    GroupState,
    Manifest,
    OptimizerState,
    StoredObject,
    StoredRange,
    folder_of,
    parameter_digest,
)
from ringworld_workers.checkpoint.load_plan import GAP_BYTES, READ_BYTES, RangeIndex, Want
from ringworld_workers.checkpoint.reader import RangeReader, load, read_manifest
from ringworld_workers.checkpoint.together import raise_together
from ringworld_workers.checkpoint.writer import CheckpointWriter
from ringworld_workers.engine.base import OwnedRange
from ringworld_workers.initial_weights import set_initial_weights
from ringworld_workers.mesh import Mesh, build_mesh
from ringworld_workers.restoring import Start, restore
from ringworld_workers.store.base import NotFound, Store, StoreError
from ringworld_workers.store.file_store import FileStore
from ringworld_workers.store.opening import open_store

KINDS = ("param", "exp_avg", "exp_avg_sq")
ROWS = 4


SHAPES = {
    "0.weight": (5, 3),
    "0.bias": (5,),
    "1.weight": (5,),
    "1.bias": (5,),
    "2.weight": (1, 5),
    "2.bias": (1,),
}


def values_of(step: int) -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        (name, kind): torch.rand(shape, generator=generator)
        for name, shape in SHAPES.items()
        for kind in KINDS
    }


def write(
    store: Store, step: int, *, stage_index: int = 0, final: bool = False, **fields: Any
) -> CheckpointRef:
    """A checkpoint of two objects, each with half of every tensor."""
    stage = f"s{stage_index}"
    folder = folder_of(stage_index, stage, step)
    objects = []
    for rank in range(2):
        ranges, data = [], bytearray()
        for (name, kind), tensor in values_of(step).items():
            start, stop = (tensor.numel() * (rank + half) // 2 for half in (0, 1))
            part = tensor.view(-1)[start:stop].numpy().tobytes()
            if part:
                place = (name, kind, start, stop - start, len(data), len(part), "float32")
                ranges.append(StoredRange(*place, (crc32c(part),)))
                data += part
        key = f"{folder}/rank-{rank:05d}-{step}.bin"
        store.put(key, [data])
        objects.append(StoredObject(key, len(data), tuple(ranges)))
    manifest = Manifest(
        **{"run_id": "run-1", "run_uid": "uid-1", "attempt": 1, "world_size": 2} | fields,
        mesh={},
        parameter_digest=parameter_digest(SHAPES),
        tensors=SHAPES,
        objects=tuple(objects),
        optimizer=OptimizerState("adamw", step, (GroupState("decay", 0.5, 0.25),)),
        state=state_at(step, stage_index=stage_index, final=final, rows_per_step=ROWS),
    )
    store.put(f"{folder}/manifest.json", [manifest.to_json()])
    return CheckpointRef(store.url, stage, stage_index, step, folder)


def has(engine: Any, step: int, kinds: Sequence[str] = KINDS) -> bool:
    wanted = values_of(step)
    return all(
        torch.equal(held.data, wanted[held.tensor, held.kind].view(-1))
        for held in engine.owned_ranges()
        if held.kind in kinds
    )


@pytest.fixture
def folder_store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "checkpoints")


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return FileStore(tmp_path / "checkpoints")
    return open_store(request.getfixturevalue("s3_url"))


# Damage.


def flip_a_byte(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[100] ^= 1
    store.put(key, [data])


def truncate(store: Store, key: str) -> None:
    store.put(key, [store.get(key)[:-1]])


def remove(store: Store, key: str) -> None:
    store.delete(key)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, r"is damaged: the checksum of bytes 96 to 108 \(param of 0.bias\)"),
        (truncate, "is truncated: it has 251 of 252 bytes"),
        (remove, "is missing: there is no such object in"),
    ],
)
def test_a_damaged_object_is_named(
    store: Store, mesh: Mesh, damage: Callable[[Store, str], None], reason: str
) -> None:
    ref = write(store, 1)
    key = f"{ref.key}/rank-00001-1.bin"
    engine = make_engine(mesh)
    assert load(store, ref, engine, mesh, with_optimizer=True).step == 1
    assert has(engine, 1)
    damage(store, key)
    with pytest.raises(DamagedCheckpoint, match=reason) as caught:
        load(store, ref, engine, mesh, with_optimizer=True)
    assert f"object {key} is" in str(caught.value)
    # Without the look at the whole folder, too.
    names = [("0.bias", "param"), ("2.bias", "exp_avg_sq")]
    targets = [torch.empty(SHAPES[name]) for name, _ in names]
    with pytest.raises(DamagedCheckpoint, match=reason.partition(":")[0]):
        RangeReader(store, read_manifest(store, ref)).read(
            [
                OwnedRange(name, kind, SHAPES[name], 0, target)  # type: ignore[arg-type]
                for (name, kind), target in zip(names, targets, strict=True)
            ]
        )


def test_manifests_that_are_damaged_or_of_another_run_are_named(store: Store, mesh: Mesh) -> None:
    ref = write(store, 1)
    key = f"{ref.key}/manifest.json"
    content = json.loads(store.get(key))
    for data, reason in (
        (b"", "step-00000001/manifest.json is damaged"),
        (store.get(key)[:-7], "step-00000001/manifest.json is damaged"),
        (store.get(key).replace(b'"cursor":4', b'"cursor":8'), "its checksum is wrong"),
    ):
        store.put(key, [data])
        with pytest.raises(DamagedCheckpoint, match=reason):
            load(store, ref, make_engine(mesh), mesh, with_optimizer=True)
    store.put(key, [json.dumps(content | {"version": 1}).encode()])
    with pytest.raises(CheckpointError, match="version 1 in chunks .* reads version 3"):
        load(store, ref, make_engine(mesh), mesh, with_optimizer=True)
    absent = replace(ref, key="00-s0/step-00000007")
    with pytest.raises(CheckpointError, match="step-00000007.* cannot be read.*no such object"):
        load(store, absent, make_engine(mesh), mesh, with_optimizer=True)

    # Copied, with its objects, from another run's folder.
    for other, told in (
        ({"run_id": "run-2"}, r"of run-2 \(uid-1\), and this is run-1 \(uid-1\)"),
        ({"run_uid": "uid-2"}, r"of run-1 \(uid-2\), and this is run-1 \(uid-1\)"),
    ):
        write(store, 2, **other)
        with pytest.raises(DamagedCheckpoint, match="manifest of another run: " + told):
            begin(job(), store, make_engine(mesh), mesh)
    # One that does not know its run's uid is taken at its name's word.
    write(store, 2, run_uid="")
    assert begin(job(), store, make_engine(mesh), mesh)[0].step == 2


def test_another_model_or_optimizer_is_refused(folder_store: FileStore, mesh: Mesh) -> None:
    ref = write(folder_store, 1)
    with pytest.raises(CheckpointError, match=r"parameter 0.bias is \(5,\) in it and \(6,\) in"):
        load(folder_store, ref, make_engine(mesh, width=6), mesh, with_optimizer=True)
    engine = make_engine(mesh, optimizer="sgd")
    with pytest.raises(CheckpointError, match="state of adamw, the job uses sgd"):
        load(folder_store, ref, engine, mesh, with_optimizer=True)
    load(folder_store, ref, engine, mesh, with_optimizer=False)
    assert has(engine, 1, ["param"])


class Faulty(FileStore):
    """Reads fail, or flip a byte of what they return, a number of times."""

    def __init__(self, root: Path, times: int, error: StoreError | None = None) -> None:
        super().__init__(root)
        self.times, self.error = times, error

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        super().read_into(key, offset, buffers)
        if "rank-00001" in key and self.times > 0:
            self.times -= 1
            if self.error is not None:
                raise self.error
            buffers[0][0] ^= 1


def test_what_a_second_reading_mends_is_no_damage(folder_store: FileStore, mesh: Mesh) -> None:
    ref = write(folder_store, 1)
    engine = make_engine(mesh)
    load(Faulty(folder_store.root, 1), ref, engine, mesh, with_optimizer=True)
    assert has(engine, 1)
    with pytest.raises(DamagedCheckpoint, match="the checksum of bytes 0 to"):
        load(Faulty(folder_store.root, 2), ref, engine, mesh, with_optimizer=True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StoreError("read", "k", "the server is on fire", transient=True), StoreError),
        (StoreError("read", "k", "the server is on fire"), CheckpointError),
        # As from a proxy that knows no such place, though the listing has it.
        (NotFound("read", "k", "the server is on fire"), CheckpointError),
    ],
)
def test_a_store_that_fails_is_no_damage(
    folder_store: FileStore, mesh: Mesh, error: StoreError, kind: type[Exception]
) -> None:
    """What may pass is told from what will not, and neither has a checkpoint set aside."""
    write(folder_store, 1)
    write(folder_store, 2)
    store = Faulty(folder_store.root, 99, error)
    with pytest.raises(kind, match="the server is on fire") as caught:
        begin(job(take_older=True), store, make_engine(mesh), mesh)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert len(committed(folder_store)) == 2


def fail_apart(rank: int, world_size: int) -> list[str]:
    mesh = build_mesh(1, world_size)
    damaged, refused = DamagedCheckpoint("flipped"), CheckpointError("forbidden")
    passing = StoreError("read", "k", "down", transient=True, attempts=3)
    told = []
    for failures in (
        [None, damaged, None],
        [damaged, refused, None],
        [damaged, refused, passing],
        [None, None, None],
    ):
        try:
            raise_together(failures[rank], mesh)
            told.append("fine")
        except (CheckpointError, StoreError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_a_failure_of_one_rank_is_one_of_all(run_gang: Callable[..., list[Any]]) -> None:
    for told in run_gang(fail_apart, 3):
        assert told == [
            "DamagedCheckpoint: rank 1: flipped",
            "CheckpointError: rank 1: forbidden",
            "StoreError: rank 2: read k: down (trying again may help, tried 3 times)",
            "fine",
        ]


def load_damaged(rank: int, world_size: int, folder: str) -> str:
    mesh = build_mesh(1, world_size)
    (ref,) = committed(FileStore(Path(folder)))
    # Only the last rank meets the damage.
    store = Faulty(Path(folder), 99 if rank == world_size - 1 else 0)
    try:
        load(store, ref, make_engine(mesh), mesh, with_optimizer=True)
    except DamagedCheckpoint as error:
        return str(error)
    return "loaded"


def test_damage_on_one_rank_is_raised_on_all(
    run_gang: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write(FileStore(tmp_path), 1)
    (message,) = set(run_gang(load_damaged, 2, str(tmp_path)))
    assert message.startswith("rank 1: object 00-s0/step-00000001/rank-00001-1.bin is damaged")


# Where a stage starts.


def job(*, stage_index: int = 0, init_from: str | None = None, **fields: Any) -> Any:
    when_damaged = fields.pop("when_damaged", "stop")
    inherits = fields.pop("inherits", False)
    stages = [
        SimpleNamespace(
            name=f"s{index}",
            rows_per_step=ROWS,
            optimizer_state="inherit" if inherits else "fresh",
        )
        for index in range(2)
    ]
    spec = SimpleNamespace(
        stages=stages,
        checkpoint=SimpleNamespace(when_damaged=when_damaged),
        model=SimpleNamespace(init_from=init_from),
    )
    given = {"run_id": "run-1", "run_uid": "uid-1", "take_older": False} | fields
    return SimpleNamespace(spec=spec, stage_index=stage_index, stage=stages[stage_index], **given)


def begin(of_job: Any, store: Store, engine: Any, mesh: Mesh) -> tuple[Start, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    reporter: Any = SimpleNamespace(event=events.append, phase=lambda name, step: None)
    start = restore(of_job, store, engine, mesh, reporter)
    if start.key is None and of_job.spec.model.init_from:
        set_initial_weights(engine, of_job, mesh, reporter)
    return start, events


def test_the_next_older_checkpoint_is_offered(store: Store, mesh: Mesh) -> None:
    for step in (1, 2, 3):
        write(store, step)
    engine = make_engine(mesh)
    flip_a_byte(store, "00-s0/step-00000003/rank-00000-3.bin")
    with pytest.raises(DamagedCheckpoint) as caught:
        begin(job(), store, engine, mesh)
    assert "object 00-s0/step-00000003/rank-00000-3.bin is damaged" in str(caught.value)
    assert str(caught.value).endswith(
        "; the next older checkpoint is 00-s0/step-00000002: take it by `ringworld resume run-1 "
        "--older`, or always by checkpoint.when_damaged: older"
    )
    assert len(committed(store)) == 3, "nothing is set aside unless asked for"


@pytest.mark.parametrize("how", [{"take_older": True}, {"when_damaged": "older"}])
def test_damaged_checkpoints_are_set_aside(
    folder_store: FileStore, mesh: Mesh, how: dict[str, Any]
) -> None:
    for step in (1, 2, 3):
        write(folder_store, step)
    engine = make_engine(mesh)
    flip_a_byte(folder_store, "00-s0/step-00000003/rank-00000-3.bin")
    held = folder_store.get("00-s0/step-00000003/manifest.json")
    folder_store.put("00-s0/step-00000002/manifest.json", [b"{"])
    start, events = begin(job(**how), folder_store, engine, mesh)
    assert (start.step, start.key, start.resumed) == (1, "00-s0/step-00000001", True)
    assert has(engine, 1)
    assert [ref.step for ref in committed(folder_store)] == [1]
    assert folder_store.get("00-s0/step-00000003/manifest.damaged.json") == held
    assert [event["checkpoint"] for event in events] == [
        "00-s0/step-00000003",
        "00-s0/step-00000002",
    ]
    assert events[0]["kind"] == "damaged_checkpoint"
    assert "rank-00000-3.bin is damaged" in events[0]["text"]
    assert events[0]["text"].endswith("it is set aside, and 00-s0/step-00000002 is tried")
    # The last one is kept whatever happens to it: without any the run would begin anew.
    remove(folder_store, "00-s0/step-00000001/rank-00001-1.bin")
    with pytest.raises(DamagedCheckpoint, match="no older checkpoint that stage s0 could start"):
        begin(job(**how), folder_store, engine, mesh)
    assert [ref.step for ref in committed(folder_store)] == [1]


def test_older_goes_down_to_the_end_of_the_stage_before(
    folder_store: FileStore, mesh: Mesh
) -> None:
    write(folder_store, 1)
    write(folder_store, 2, final=True)
    write(folder_store, 1, stage_index=1)
    engine = make_engine(mesh)
    remove(folder_store, "01-s1/step-00000001/rank-00000-1.bin")
    start, _ = begin(job(stage_index=1, take_older=True), folder_store, engine, mesh)
    assert (start.step, start.tokens, start.key) == (0, 2, "00-s0/step-00000002")
    assert has(engine, 2, ["param"]) and not start.resumed
    assert engine.optimizer_state().step == 0, "the stage does not inherit"
    begin(job(stage_index=1, inherits=True), folder_store, engine, mesh)
    assert has(engine, 2) and engine.optimizer_state().step == 2
    # What lies before the end of a stage is no place for the next one to start from.
    remove(folder_store, "00-s0/step-00000002/rank-00000-2.bin")
    with pytest.raises(DamagedCheckpoint, match="no older checkpoint that stage s1 could start"):
        begin(job(stage_index=1, take_older=True), folder_store, engine, mesh)


def test_a_state_of_the_generator_that_is_none_is_damage(
    folder_store: FileStore, mesh: Mesh
) -> None:
    ref = write(folder_store, 1)
    manifest = read_manifest(folder_store, ref)
    for rng in ("AAAA", "?", 5, {"a": 1}):
        changed = replace(manifest, state=replace(manifest.state, rng=rng))
        folder_store.put(f"{ref.key}/manifest.json", [changed.to_json()])
        with pytest.raises(DamagedCheckpoint, match="state.rng is no state of torch's generator"):
            begin(job(), folder_store, make_engine(mesh), mesh)


def test_a_first_stage_starts_from_another_run(store: Store, tmp_path: Path, mesh: Mesh) -> None:
    """Of another store, name, and uid, and with hyper-parameters of its own."""
    source = open_store(f"{store.url}/old/checkpoints")
    write(source, 5, stage_index=1, run_id="old", run_uid="uid-0")
    own = FileStore(tmp_path / "own")
    init_from = f"run:{source.url}/01-s1/step-00000005"
    engine = make_engine(mesh)
    groups = engine.optimizer_state().groups
    start, events = begin(job(init_from=init_from), own, engine, mesh)
    assert start == Start(step=0, tokens=0, key=None)
    assert has(engine, 5, ["param"]) and engine.optimizer_state().step == 0
    (event,) = events
    assert event["kind"] == "weights" and event["init_from"] == init_from
    assert event["text"] == f"stage s0: weights from {init_from}, after 5 tokens"
    assert event["left"] == ["optimizer state"]

    _, (event,) = begin(job(init_from=init_from, inherits=True), own, engine, mesh)
    assert has(engine, 5) and engine.optimizer_state() == OptimizerState("adamw", 5, groups)
    assert event["text"].startswith("stage s0: weights and optimizer state from run:")

    # Not once the run has a checkpoint of its own.
    write(own, 1)
    assert begin(job(init_from=init_from), own, engine, mesh)[0].step == 1
    new = FileStore(tmp_path / "new")
    assert begin(job(), new, engine, mesh) == (Start(0, 0, None), [])
    flip_a_byte(source, "01-s1/step-00000005/rank-00000-5.bin")
    with pytest.raises(DamagedCheckpoint, match="01-s1/step-00000005/rank-00000-5.bin is damaged"):
        begin(job(init_from=init_from, take_older=True, inherits=True), new, engine, mesh)
    assert len(committed(source)) == 1, "nothing of another run is set aside"


# Reading parts.


class Counting(FileStore):
    """Notes every read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[tuple[str, int, int]] = []
        self.threads: set[int] = set()

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        self.reads.append((key, offset, sum(len(buffer) for buffer in buffers)))
        self.threads.add(threading.get_ident())
        super().read_into(key, offset, buffers)

    @property
    def bytes_read(self) -> int:
        return sum(length for _, _, length in self.reads)


def put_ranges(
    store: Store, key: str, parts: Sequence[tuple[str, int, torch.Tensor]], pad: int = 0
) -> StoredObject:
    """Values one after the other, with some bytes between them."""
    data, ranges = bytearray(), []
    for tensor, start, values in parts:
        data += b"\xff" * pad
        raw = values.numpy().tobytes()
        sums = [
            crc32c(raw[first : first + CHUNK_BYTES]) for first in range(0, len(raw), CHUNK_BYTES)
        ]
        place = (tensor, "param", start, values.numel(), len(data), len(raw), "float32")
        ranges.append(StoredRange(*place, tuple(sums)))
        data += raw
    store.put(key, [data])
    return StoredObject(key, len(data), tuple(ranges))


CHUNK = CHUNK_BYTES // 4
NUMEL = 2 * CHUNK + 1000
SPLIT = NUMEL // 3


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, torch.Tensor]:
    """A tensor in three ranges of two objects, one of them larger than a chunk."""
    root = tmp_path_factory.mktemp("parts")
    values = torch.arange(NUMEL, dtype=torch.float32)
    cuts = ((0, SPLIT), (SPLIT, SPLIT + 9), (SPLIT + 9, NUMEL))
    (a, b, c) = (("w", start, values[start:stop]) for start, stop in cuts)
    objects = (
        put_ranges(FileStore(root), "a", [b, a], pad=4),
        put_ranges(FileStore(root), "b", [c], pad=8),
    )
    return root, SimpleNamespace(objects=objects), values


EDGES = sorted(
    {
        edge + step
        for edge in (0, SPLIT, SPLIT + 9, SPLIT + 9 + CHUNK, CHUNK, NUMEL)
        for step in (-1, 0, 1)
        if 0 <= edge + step <= NUMEL
    }
)
ELEMENT = st.one_of(st.sampled_from(EDGES), st.integers(0, NUMEL))


@settings(max_examples=60, deadline=None)
@given(spans=st.lists(st.tuples(ELEMENT, ELEMENT), min_size=1, max_size=4))
def test_any_parts_are_read_in_place(
    parts: tuple[Path, Any, torch.Tensor], spans: list[tuple[int, int]]
) -> None:
    root, manifest, values = parts
    store = Counting(root)
    spans = [(min(span), max(span)) for span in spans if span[0] != span[1]]
    # A view inside other memory, which stays as it was.
    memory = [torch.full((stop - start + 2,), -1.0) for start, stop in spans]
    RangeReader(store, manifest).read(
        [
            OwnedRange("w", "param", (NUMEL,), start, held[1:-1])
            for (start, _), held in zip(spans, memory, strict=True)
        ]
    )
    for (start, stop), held in zip(spans, memory, strict=True):
        assert torch.equal(held[1:-1], values[start:stop]), (start, stop)
        assert held[0] == held[-1] == -1.0
    whole_chunks = sum(2 * CHUNK_BYTES * 3 + (stop - start) * 4 for start, stop in spans)
    assert store.bytes_read <= whole_chunks


def test_only_what_is_needed_is_read(parts: tuple[Path, Any, torch.Tensor]) -> None:
    root, manifest, values = parts
    store = Counting(root)
    first = SPLIT + 9 + CHUNK
    target = torch.empty(5)
    RangeReader(store, manifest).read_into(OwnedRange("w", "param", (NUMEL,), first, target))
    assert torch.equal(target, values[first : first + 5])
    assert store.reads == [("b", 8 + CHUNK_BYTES, manifest.objects[1].size - 8 - CHUNK_BYTES)]
    with pytest.raises(DamagedCheckpoint, match=f"no object holds elements {NUMEL} to {NUMEL + 2}"):
        past = OwnedRange("w", "param", (NUMEL,), NUMEL - 1, torch.empty(3))
        RangeReader(store, manifest).read_into(past)
    with pytest.raises(DamagedCheckpoint, match="no object holds elements 0 to 3 of param of v"):
        RangeReader(store, manifest).read_into(OwnedRange("v", "param", (3,), 0, torch.empty(3)))


def test_large_and_small_ranges_make_few_parallel_requests(tmp_path: Path) -> None:
    """Small ones share a request, with the bytes between them; large ones are cut."""
    store = Counting(tmp_path)
    large = torch.arange((2 * READ_BYTES + CHUNK_BYTES) // 4, dtype=torch.float32)
    small = [(f"t{number}", 0, torch.full((7,), float(number))) for number in range(50)]
    objects = (
        put_ranges(store, "a", [("large", 0, large)], pad=4),
        put_ranges(store, "b", small, pad=1000),
    )
    index = RangeIndex(objects)
    wants = [Want(name, "param", 0, 7) for name, _, _ in small if name != "t20"]
    wants.append(Want("large", "param", 5, len(large) - 5))
    reads = index.plan(wants)
    assert [(read.key, read.stop - read.offset) for read in reads] == [
        ("a", READ_BYTES),
        ("a", READ_BYTES),
        ("a", CHUNK_BYTES),
        ("b", 50 * 28 + 49 * 1000),
    ]
    assert index.plan(wants, first=0.5) == reads[2:] + reads[:2]

    targets = [torch.empty(want.numel) for want in wants]
    beats: list[int] = []
    RangeReader(store, SimpleNamespace(objects=objects), first=0.5).read(  # type: ignore[arg-type]
        [
            OwnedRange(want.tensor, "param", (), want.start, target)
            for want, target in zip(wants, targets, strict=True)
        ],
        lambda: beats.append(threading.get_ident()),
    )
    assert beats == [threading.get_ident()] * len(reads)
    assert torch.equal(targets.pop(), large[5:])
    for want, target in zip(wants, targets, strict=False):
        assert (target == float(want.tensor[1:])).all()
    assert len(store.reads) == len(reads) and len(store.threads) > 1
    # Far apart, they are two requests.
    far = put_ranges(store, "far", [("p", 0, small[0][2]), ("q", 0, small[1][2])], GAP_BYTES + 4)
    plan = RangeIndex([far]).plan([Want("p", "param", 0, 7), Want("q", "param", 0, 7)])
    assert [read.stop - read.offset for read in plan] == [28, 28]


def test_values_go_where_host_memory_is_not_their_place(folder_store: FileStore) -> None:
    """As to a GPU: through other memory, in which each read finds its own room."""
    ref = write(folder_store, 1)
    manifest = read_manifest(folder_store, ref)
    spread = {name: torch.zeros(math.prod(shape), 2)[:, 0] for name, shape in SHAPES.items()}
    RangeReader(folder_store, manifest).read(
        [OwnedRange(name, "param", SHAPES[name], 0, data) for name, data in spread.items()]
    )
    for name, data in spread.items():
        assert torch.equal(data, values_of(1)[name, "param"].view(-1)), name


# Another program.


def test_the_documented_reader_reads_what_an_engine_wrote(
    folder_store: FileStore, mesh: Mesh
) -> None:
    """It knows docs/checkpoint_format.md only."""
    program = Path(__file__).parents[3] / "docs" / "read_checkpoint.py"
    assert len(program.read_text().splitlines()) <= 60
    spec = importlib.util.spec_from_file_location("read_checkpoint", program)
    assert spec is not None and spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    assert reader.crc32c(b"123456789") == 0xE3069283

    engine = make_engine(mesh)
    engine.backward((engine(torch.ones(2, 3)) ** 2).sum() * engine.loss_factor)
    engine.step()
    settings = SimpleNamespace(checkpoint=CheckpointSpec())
    fields = {"run_id": "run-1", "run_uid": "uid-1", "attempt": 1, "stage_index": 0}
    of_job: Any = SimpleNamespace(spec=settings, **fields)
    writer = CheckpointWriter(folder_store, mesh, of_job)
    writer.open()
    writer.snapshot(engine, state_at(1))
    folder = folder_store.root / writer.commit()["key"]
    writer.close()
    for held in engine.owned_ranges():
        found = reader.read(folder, held.tensor, held.kind)
        assert torch.equal(torch.from_numpy(found), held.data.view(held.shape)), held.tensor

    # Of several objects, and as a program.
    halves = write(folder_store, 2)
    for (name, kind), values in values_of(2).items():
        found = reader.read(folder_store.root / halves.key, name, kind)
        assert torch.equal(torch.from_numpy(found), values), name
    command = [sys.executable, program, folder_store.root / halves.key, "2.bias"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    expected = float(values_of(2)["2.bias", "param"])
    assert float(done.stdout.strip("[]\n")) == pytest.approx(expected)

    manifest = read_manifest(folder_store, committed(folder_store)[0])
    flip_a_byte(folder_store, manifest.objects[0].key)
    with pytest.raises(ValueError, match="bytes .* are wrong"):
        for name in SHAPES:
            reader.read(folder, name)
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"cursor":1', b'"cursor":2'))
    with pytest.raises(ValueError, match="the manifest's digest is wrong"):
        reader.read(folder, "0.weight")
