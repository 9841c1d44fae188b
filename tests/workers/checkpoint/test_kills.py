"""Saves and loads whose processes, server or disk go away: what was committed loads bit-equal.

A gang of two ranks saves step after step and is killed; the next one goes on from what it finds.
``KILLS=20 SEED=1 WIDTH=2000 pytest --log-cli-level=info`` kills more often than the suite does, at
other moments, and with larger objects.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ringworld_jobs.spec import JobSpec
from ringworld_model.config import ModelConfig
from ringworld_workers import testing
from ringworld_workers.boundary import agree
from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.checkpoint.reader import load, read_manifest
from ringworld_workers.checkpoint.retention import prune
from ringworld_workers.checkpointing import StageCheckpoints
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import Mesh, build_mesh
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store

log = logging.getLogger(__name__)

WIDTH = 160
"""Of the model: a rank's part of a checkpoint has 150 KiB or so."""
STEPS = 1000


class Listener:
    """A reporter that keeps what it is told."""

    def __init__(self, committed: Callable[[int], None] = lambda step: None) -> None:
        self.events: list[str] = []
        self._committed = committed

    def phase(self, name: str, step: int) -> None:
        pass

    def metrics(self, record: dict[str, Any]) -> None:
        if record["kind"] == "checkpoint":
            self._committed(record["step"])

    def event(self, record: dict[str, Any]) -> None:
        self.events.append(record["text"])

    def should_stop(self) -> bool:
        return False

    def position(self) -> int:
        return 0

    def stored(self, position: int) -> bool:
        return True


def stage_job(url: str, *, attempt: int = 1, world_size: int = 1, **checkpoint: Any) -> StageJob:
    stage = {
        "name": "a",
        "context_length": "128",
        "rope_theta": 1e4,
        "steps": STEPS,
        "global_batch_tokens": 256,
        "mixture": {"a": 1},
        "learning_rate": {"peak": 0.01},
    }
    spec = {
        "kind": "train",
        "name": "job",
        "data": {},
        "checkpoint": {"store": url, "every": "1 steps", **checkpoint},
        "stages": [stage],
    }
    return StageJob(
        run_id="job-1",
        run_uid="uid-1",
        spec=JobSpec.model_validate(spec),
        stage_index=0,
        attempt=attempt,
        world_size=world_size,
        sequence_parallel_size=1,
        data_parallel_size=world_size,
        device="cpu",
        data_dir="",
        sources={},
        model_config=ModelConfig(
            hidden_size=8,
            ffn_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            text_vocab_size=8,
        ),
        checkpoint_url=f"{url}/job-1/checkpoints",
        spec_digest="d",
    )


def make_engine(job: StageJob, mesh: Mesh, width: int = WIDTH) -> Any:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 1))
    return build_engine("torch", module, job.spec.optimizer, job.stage, mesh)


def train(engine: Any, mesh: Mesh, step: int) -> None:
    """One step, which depends on its number alone."""
    for _ in range(2 // mesh.world_size):
        batch = torch.full((2, 3), 1.0 + step % 7)
        engine.backward((engine(batch) ** 2).sum() * engine.loss_factor)
    engine.step()


def digest(engine: Any) -> str:
    """Of weights, moments and the optimizer's step; the same on any number of ranks."""
    whole = hashlib.sha256(str(engine.optimizer_state().step).encode())

    def read(ranges: Any) -> None:
        for owned in sorted(ranges, key=lambda owned: (owned.tensor, owned.kind)):
            whole.update(owned.data.numpy().tobytes())

    state = engine.optimizer_state()
    engine.load_ranges(read, state)  # shows all of it, and changes nothing
    return whole.hexdigest()


class Diary:
    """What a gang says of itself, in files that outlive it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def about_to_save(self, step: int, state: str) -> None:
        """Note the state of a step; a step that is done again must come out the same."""
        file = self.folder / f"digest-{step}"
        if file.exists():
            assert file.read_text() == state, f"step {step} came out otherwise"
        self._write(file, state)

    def committed(self, step: int) -> None:
        self._write(self.folder / "committed", str(max(step, self.last_committed())))

    def reached(self, place: str, attempt: int) -> None:
        self._write(self.folder / place, str(attempt))

    def has_reached(self, place: str, attempt: int) -> bool:
        return (file := self.folder / place).exists() and file.read_text() == str(attempt)

    def digest(self, step: int) -> str:
        return (self.folder / f"digest-{step}").read_text()

    def last_committed(self) -> int:
        file = self.folder / "committed"
        return int(file.read_text()) if file.exists() else 0

    def _write(self, file: Path, text: str) -> None:
        part = file.with_suffix(".part")
        part.write_text(text)
        part.replace(file)


def save_on_and_on(
    rank: int,
    world_size: int,
    job: StageJob,
    folder: str,
    environment: dict[str, str],
    saves: int,
    width: int,
) -> int:
    """A stage of steps of no length, each of which is saved; returns the last one."""
    os.environ.update(environment)
    mesh = build_mesh(1, world_size)
    diary = Diary(Path(folder))
    engine = make_engine(job, mesh, width)
    checkpoints = StageCheckpoints(job, mesh, engine, Listener(diary.committed))
    if rank == 0:
        diary.reached("load", job.attempt)
    start = checkpoints.restore()
    if rank == 0:
        diary.reached("save", job.attempt)
        assert start.step >= diary.last_committed(), "what was committed is not found again"
        assert start.step == 0 or digest(engine) == diary.digest(start.step)
    for step in range(start.step + 1, start.step + saves + 1):
        train(engine, mesh, step)
        if rank == 0:
            diary.about_to_save(step, digest(engine))
        save(checkpoints, step)
    assert checkpoints.stop(start.step + saves) is None
    checkpoints.close()
    return start.step + saves


def save(checkpoints: StageCheckpoints, step: int, *, stop: bool = False) -> None:
    """What the train loop does between two steps."""
    checkpoints.note_step(step)
    agreed = agree(
        [],
        checkpoints.mesh.control_group,
        stop=stop,
        checkpoint_due=checkpoints.due(),
        uploads_pending=checkpoints.pending(),
    )
    checkpoints.at_boundary(agreed, step, step, lambda: None)


class Gang:
    """Two ranks that can be killed, forked as ``run_gang`` forks its own."""

    def __init__(self, folder: Path, *args: Any, timeout: float = 60.0) -> None:
        self.folder = folder
        folder.mkdir()
        context = multiprocessing.get_context("forkserver")
        target = testing._locate(save_on_and_on)
        self.ranks: list[Any] = [
            context.Process(
                target=testing._child,
                args=(rank, 2, target, args, str(folder), timeout),
                daemon=True,
            )
            for rank in range(2)
        ]
        for process in self.ranks:
            process.start()

    def kill(self, rank: int) -> None:
        self.ranks[rank].kill()

    def ended(self, timeout: float) -> bool:
        return bool(wait([process.sentinel for process in self.ranks], timeout))

    def bury(self) -> None:
        """As the platform does once a rank has gone: the others get no time to tidy up."""
        for process in self.ranks:
            process.kill()
            process.join(10)

    def results(self) -> list[int]:
        return testing._collect(self.folder, "save_on_and_on", self.ranks, False, 0)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(1, 1)
    dist.destroy_process_group()


def check(job: StageJob, mesh: Mesh, diary: Diary, width: int = WIDTH) -> int:
    """All that is committed loads, bit for bit; returns the newest step."""
    store = open_store(job.checkpoint_url)
    refs = committed(store)
    for ref in refs:
        engine = make_engine(job, mesh, width)
        state = load(store, ref, engine, mesh, with_optimizer=True)
        assert state.step == ref.step and digest(engine) == diary.digest(ref.step), ref.key
    found = max((ref.step for ref in refs), default=0)
    assert found >= diary.last_committed(), "what was said to be committed is there"
    return found


def check_tidy(job: StageJob) -> None:
    """What the killed gangs have left is known for what it is, and can be removed."""
    store = open_store(job.checkpoint_url)
    prune(store, 2, True, unfinished_seconds=-60)
    refs = committed(store)
    wanted = {f"{ref.key}/manifest.json" for ref in refs}
    for ref in refs:
        wanted |= {stored.key for stored in read_manifest(store, ref).objects}
    assert {info.key for info in store.list()} == wanted | {"writer.json"}
    assert not store.unfinished()


# Where a gang on S3 is killed: at which request, and before, in or after it.
MOMENTS: list[tuple[str, str, str]] = [
    ("PutObject", r"\.bin$", "upload"),
    ("PutObject", r"manifest\.json$", "commit"),
    ("DeleteObjects?", "", "retention"),
    ("GetObject", r"\.bin$", "load"),
    ("GetObject", r"\.json$", "load"),
    ("ListObjects", "", "load"),
    ("PutObject", r"writer\.json$", "fence"),
]
_AGAIN = ("upload", "commit", "retention")
"""Phases that a gang comes to more than once."""
SIDES = {
    "PutObject": ["reset_before_body", "reset_in_body", "lost_reply"],
    "GetObject": ["reset_before_body", "reset_in_reply", "lost_reply"],
}


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_a_rank_is_killed_again_and_again(
    scheme: str,
    request: pytest.FixtureRequest,
    run_gang: object,
    tmp_path: Path,
    mesh: Mesh,
) -> None:
    proxy, environment = None, {}
    if scheme == "s3":
        proxy = request.getfixturevalue("fault_proxy")
        url = request.getfixturevalue("s3_url")
        environment = {name: v for name, v in os.environ.items() if name.startswith("AWS_")}
    else:
        url = f"file://{tmp_path}/store"
    kills, width = int(os.environ.get("KILLS", "3")), int(os.environ.get("WIDTH", WIDTH))
    chance = random.Random(int(os.environ.get("SEED", "5")))
    diary = Diary(tmp_path)
    counts: dict[str, int] = {}
    attempt = 0
    while attempt < kills:
        attempt += 1
        victim = chance.randrange(2)
        job = stage_job(url, attempt=attempt, world_size=2)
        gang = Gang(tmp_path / f"gang-{attempt}", job, str(tmp_path), environment, STEPS, width)
        if proxy is not None and attempt % 4:
            operation, key, phase = chance.choice(MOMENTS if attempt > 1 else MOMENTS[:2])
            side = chance.choice(SIDES.get(operation, ["reset_before_body", "lost_reply"]))
            proxy.inject(
                side,
                operation=operation,
                key=key,
                skip=chance.randrange(4) if phase in _AGAIN else 0,
                then=lambda gang=gang, victim=victim: gang.kill(victim),
            )
            what = f"{phase} {side}"
            assert gang.ended(60), f"{what}: nobody was killed"
        else:
            place, seconds = chance.choice([("load", 0.1), ("save", 0.3), ("save", 1.0)])
            while not diary.has_reached(place, attempt):
                assert not gang.ended(0.005), gang.results()
            time.sleep(chance.uniform(0, seconds))
            gang.kill(victim)
            what = f"{place} at some moment"
            assert gang.ended(10)
        time.sleep(chance.uniform(0, 0.3))  # the other one lives on for a moment
        gang.bury()
        if proxy is not None:
            proxy.heal()
        counts[what] = counts.get(what, 0) + 1
        check(job, mesh, diary, width)
    job = stage_job(url, attempt=attempt + 1, world_size=2)
    before = check(job, mesh, diary, width)
    gang = Gang(tmp_path / "gang-last", job, str(tmp_path), environment, 3, width)
    for process in gang.ranks:
        process.join(60)
    assert gang.results() == [before + 3] * 2, "the next gang goes on from the newest"
    assert check(job, mesh, diary, width) == before + 3
    check_tidy(job)
    log.info("%s: %d kills: %s; newest step %d", scheme, kills, counts, before)
