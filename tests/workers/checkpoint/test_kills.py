"""Saves and loads whose processes, server or disk go away: what was committed loads bit-equal.

A gang of two ranks saves step after step and is killed; the next one goes on from what it finds.
``KILLS=20 SEED=1 WIDTH=2000 pytest --log-cli-level=info`` kills more often than the suite does, at
other moments, and with larger objects.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_jobs import STEPS, stage_job
from small_disk import fill, small_disk
from torch import nn

from ringworld_platform.local_s3 import LocalS3
from ringworld_workers import testing
from ringworld_workers.boundary import agree
from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.checkpoint.layout import DamagedCheckpoint
from ringworld_workers.checkpoint.reader import load, read_manifest
from ringworld_workers.checkpoint.retention import prune
from ringworld_workers.checkpointing import StageCheckpoints
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import Mesh, build_mesh
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.base import StoreError
from ringworld_workers.store.opening import open_store
from ringworld_workers.store.retry import Patience
from ringworld_workers.store.s3_store import S3Store

log = logging.getLogger(__name__)

WIDTH = 160
"""Of the model: a rank's part of a checkpoint has 150 KiB or so."""


class Listener:
    """A reporter that keeps what it is told."""

    def __init__(self, committed: Callable[[int], None] = lambda step: None) -> None:
        self.events: list[str] = []
        self._committed = committed
        self._actions: dict[str, Callable[[], object]] = {}
        self._stop = False

    def phase(self, name: str, step: int) -> None:
        pass

    def metrics(self, record: dict[str, Any]) -> None:
        if record["kind"] == "checkpoint":
            self._committed(record["step"])

    def event(self, record: dict[str, Any]) -> None:
        self.events.append(record["text"])
        for words in list(self._actions):
            if words in record["text"]:
                self._actions.pop(words)()

    def when(self, words: str, action: Callable[[], object]) -> None:
        """Do it once, when an event has these words."""
        self._actions[words] = action

    def stop(self) -> None:
        self._stop = True

    def should_stop(self) -> bool:
        return self._stop

    def position(self) -> int:
        return 0

    def stored(self, position: int) -> bool:
        return True


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
        part = file.with_suffix(f".{os.getpid()}")
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
    promised = diary.last_committed()
    if rank == 0:
        diary.reached("load", job.attempt)
    start = checkpoints.restore()
    if rank == 0:
        diary.reached("save", job.attempt)
        assert start.step >= promised, "what was committed is not found again"
        assert start.step == 0 or digest(engine) == diary.digest(start.step)
    for step in range(start.step + 1, start.step + saves + 1):
        train(engine, mesh, step)
        if rank == 0:
            diary.about_to_save(step, digest(engine))
        save(checkpoints, step)
    assert checkpoints.stop(start.step + saves) is None
    checkpoints.close()
    return start.step + saves


def save(checkpoints: StageCheckpoints, step: int) -> None:
    """What the train loop does between two steps."""
    checkpoints.note_step(step)
    agreed = agree(
        [],
        checkpoints.mesh.control_group,
        stop=False,
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

    def said(self) -> str:
        """Why ranks that were not killed have ended."""
        return "\n".join(file.read_text() for file in self.folder.glob("error-*"))

    def results(self) -> list[int]:
        return testing._collect(self.folder, "save_on_and_on", self.ranks, False, 0)


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


def aws_environment() -> dict[str, str]:
    """The way to the store, for ranks: their server was started before it was known."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


# Where a gang on S3 is killed: at which request, and before, in or after it.
MOMENTS: list[tuple[str, str, str]] = [
    ("PutObject|.*MultipartUpload|UploadPart", r"\.bin$", "upload"),
    ("PutObject", r"manifest\.json$", "commit"),
    ("DeleteObjects?", "", "retention"),
    ("GetObject", r"\.bin$", "load"),
    ("GetObject", r"\.json$", "load"),
    ("ListObjects", "", "load"),
    ("PutObject", r"writer\.json$", "fence"),
]
_AGAIN = ("upload", "commit", "retention")
"""Phases that a gang comes to more than once."""
IN_IT = {"PutObject": "reset_in_body", "UploadPart": "reset_in_body", "GetObject": "reset_in_reply"}


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
        environment = aws_environment()
    else:
        url = f"file://{tmp_path}/store"
    kills, width = int(os.environ.get("KILLS", "3")), int(os.environ.get("WIDTH", WIDTH))
    limit = 60.0 if width == WIDTH else 400.0
    chance = random.Random(int(os.environ.get("SEED", "5")))
    diary = Diary(tmp_path)
    counts, others = Counter[str](), 0
    for attempt in range(1, kills + 1):
        victim = chance.randrange(2)
        job = stage_job(f"{url}/job-1/checkpoints", attempt=attempt, world_size=2)
        folder = tmp_path / f"gang-{attempt}"
        gang = Gang(folder, job, str(tmp_path), environment, STEPS, width, timeout=limit)
        if proxy is not None and attempt % 4:
            operation, key, phase = chance.choice(MOMENTS if attempt > 1 else MOMENTS[:2])
            within = [side for name, side in IN_IT.items() if name in operation][:1]
            side = chance.choice(["reset_before_body", "lost_reply", *within])
            proxy.inject(
                side,
                operation="PutObject|UploadPart" if side == "reset_in_body" else operation,
                key=key,
                skip=chance.randrange(4) if phase in _AGAIN else 0,
                then=lambda gang=gang, victim=victim: gang.kill(victim),
            )
            what = f"{phase} {side}"
            assert gang.ended(limit), f"{what}: nobody was killed"
            assert proxy.faults.total() == sum(counts.values()) - others + 1, gang.results()
        else:
            place, seconds = chance.choice([("load", 0.1), ("save", 0.3), ("save", 1.0)])
            while not diary.has_reached(place, attempt):
                assert not gang.ended(0.005), gang.results()
            time.sleep(chance.uniform(0, seconds))
            gang.kill(victim)
            what = f"{place} at some moment"
            others += 1
            assert gang.ended(10)
        time.sleep(chance.uniform(0, 0.3))  # the other one lives on for a moment
        gang.bury()
        if proxy is not None:
            proxy.heal()
        counts[what] += 1
        assert "AssertionError" not in gang.said(), gang.said()
        check(job, mesh, diary, width)
    job = stage_job(f"{url}/job-1/checkpoints", attempt=kills + 1, world_size=2)
    before = check(job, mesh, diary, width)
    folder = tmp_path / "gang-last"
    gang = Gang(folder, job, str(tmp_path), environment, 3, width, timeout=limit)
    for process in gang.ranks:
        process.join(limit)
    assert gang.results() == [before + 3] * 2, "the next gang goes on from the newest"
    assert check(job, mesh, diary, width) == before + 3
    check_tidy(job)
    log.info("%s: %d kills: %s; newest step %d", scheme, kills, dict(counts), before)


def test_of_two_gangs_one_wins_and_the_other_says_so(
    run_gang: object, s3_url: str, tmp_path: Path, mesh: Mesh
) -> None:
    diary, environment = Diary(tmp_path), aws_environment()
    jobs = [
        stage_job(f"{s3_url}/job-1/checkpoints", attempt=attempt, world_size=2)
        for attempt in (1, 2)
    ]
    old = Gang(tmp_path / "gang-1", jobs[0], str(tmp_path), environment, STEPS, WIDTH)
    while not diary.last_committed():
        assert not old.ended(0.005), old.results()
    new = Gang(tmp_path / "gang-2", jobs[1], str(tmp_path), environment, 3, WIDTH)
    for process in new.ranks + old.ranks:
        process.join(60)
    (last,) = set(new.results())
    with pytest.raises(testing.DistributedError) as caught:
        old.results()
    said = str(caught.value)
    assert said.count("TakenOver: checkpoint 00-a/step-") == 2, "every rank of it ends"
    assert "attempt 2 on" in said and "from attempt 1; stop this one" in said
    assert check(jobs[1], mesh, diary) == last


# The store goes away, or takes nothing any more, and comes back.


class Run:
    """A gang of one rank in this process."""

    def __init__(self, url: str, mesh: Mesh, folder: Path, attempt: int = 1, **spec: Any) -> None:
        self.job, self.mesh = stage_job(f"{url}/job-1/checkpoints", attempt=attempt, **spec), mesh
        self.diary = Diary(folder)
        self.listener = Listener(self.diary.committed)
        self.engine = make_engine(self.job, mesh)
        self.checkpoints = StageCheckpoints(self.job, mesh, self.engine, self.listener)
        self.step = self.checkpoints.restore().step

    def save(self) -> int:
        """Train a step, save it, and wait; returns the newest step that is committed."""
        self.step += 1
        train(self.engine, self.mesh, self.step)
        self.diary.about_to_save(self.step, digest(self.engine))
        save(self.checkpoints, self.step)
        while self.checkpoints.writer.in_flight:
            self.checkpoints.writer.wait()
            save(self.checkpoints, self.step)
        return self.diary.last_committed()

    def end(self) -> int:
        """Train a step and end the stage; returns the newest step that is committed."""
        self.step += 1
        train(self.engine, self.mesh, self.step)
        self.diary.about_to_save(self.step, digest(self.engine))
        saved = self.checkpoints.save_last(self.step, self.step, bookmark=None, metrics={})
        assert saved == (self.diary.last_committed() == self.step)
        return self.diary.last_committed()

    def check(self) -> int:
        self.checkpoints.writer.wait()  # old ones are being removed
        return check(self.job, self.mesh, self.diary)


@pytest.fixture(scope="module")
def mortal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalServer]:
    folder = tmp_path_factory.mktemp("mortal")
    with MortalServer(folder) as server:
        server.allow("Admin", "Read", "Write", "List")
        server.start("runs")
        yield server
        server.kill()


class MortalServer(LocalS3):
    """A server whose only user's rights and keys can be changed."""

    def allow(self, *actions: str, secret: str = "hush-one") -> None:
        """From the next start on."""
        credentials = {"accessKey": "key", "secretKey": secret}
        identity = {"name": "user", "credentials": [credentials], "actions": actions}
        self.folder.mkdir(exist_ok=True)
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def restart(self) -> None:
        self.kill()
        self.start()


@pytest.fixture
def mortal(
    mortal_server: MortalServer, proxy_module: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A proxy before that server; the environment leads clients to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with proxy_module.FaultProxy(("127.0.0.1", mortal_server.port)) as proxy:
        for name, value in mortal_server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize(
    ("fault", "key"), [("reset_in_body", r"\.bin$"), ("lost_reply", r"manifest\.json$")]
)
def test_the_server_dies_in_the_middle_of_a_save(
    mortal: Any, mortal_server: MortalServer, mesh: Mesh, tmp_path: Path, fault: str, key: str
) -> None:
    run = Run(f"s3://runs/dies-{fault}", mesh, tmp_path)
    assert run.save() == 1
    restarted = threading.Thread(target=mortal_server.start, daemon=True)

    def die() -> None:
        mortal_server.kill()
        restarted.start()

    mortal.inject(fault, operation="PutObject", key=key, then=die)
    assert run.save() == 2, "it is back before the store's patience ends"
    restarted.join(30)
    assert mortal.faults == {fault: 1}
    assert run.save() == run.check() == 3


def test_rights_and_keys_that_go_and_come_back(
    mortal: Any, mortal_server: MortalServer, mesh: Mesh, tmp_path: Path
) -> None:
    url = "s3://runs/rights"
    run = Run(url, mesh, tmp_path)
    assert run.save() == 1
    mortal_server.allow("Read", "List")
    mortal_server.restart()
    assert run.save() == 1, "the run goes on"
    said = run.listener.events[-1]
    assert "the checkpoint of step 2 of stage a is not saved (1 in a row" in said
    assert f"put {url}/job-1/checkpoints/00-a/step-00000002/rank-00000" in said
    assert "s3:PutObject" in said
    assert run.check() == 1, "what may be read can be loaded"
    with pytest.raises(StoreError, match="writer.json.*s3:PutObject"):
        Run(url, mesh, tmp_path, attempt=2)
    mortal_server.allow("Admin", "Read", "Write", "List", secret="hush-two")
    mortal_server.restart()
    assert run.save() == 1
    assert "AWS_SECRET_ACCESS_KEY" in run.listener.events[-1]
    assert not any("hush" in event for event in run.listener.events)
    mortal_server.allow("Admin", "Read", "Write", "List")
    mortal_server.restart()
    assert run.save() == run.check() == 4


def test_a_disk_that_is_full(mesh: Mesh, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        run = Run(f"file://{disk}/store", mesh, tmp_path)
        assert run.save() == 1
        filler = fill(disk)
        assert run.save() == 1
        assert "the disk is full; free space" in run.listener.events[-1]
        assert [ref.step for ref in committed(open_store(run.job.checkpoint_url))] == [1]
        filler.unlink()
        assert run.save() == run.check() == 3
        check_tidy(run.job)


def test_a_stage_ends_while_its_disk_is_full(mesh: Mesh, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        run = Run(f"file://{disk}/store", mesh, tmp_path, max_failures=0)
        assert run.save() == 1
        filler = fill(disk)
        run.listener.when("waits for its store up to 3600 s", filler.unlink)
        assert run.end() == 2, "it waited, and lost nothing"
        assert any("the disk is full; free space" in told for told in run.listener.events)
        # In the middle of a stage, too, once no more saves may fail.
        fill(disk)
        run.listener.when("step 3 of stage a waits for its store", filler.unlink)
        assert run.save() == run.check() == 3


def test_a_stage_ends_while_its_server_is_away(
    mortal: Any, mortal_server: MortalServer, mesh: Mesh, tmp_path: Path
) -> None:
    url = "s3://runs/away"
    run = Run(url, mesh, tmp_path)
    assert run.save() == 1
    run.checkpoints.writer._store = S3Store(
        f"{url}/job-1/checkpoints", patience=Patience(outage_seconds=0.5, attempts=2)
    )
    mortal_server.kill()
    run.listener.when("waits for its store up to 3600 s", mortal_server.start)
    assert run.end() == run.check() == 2


def test_a_stop_does_not_wait_for_a_store_that_is_away(mesh: Mesh, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        run = Run(f"file://{disk}/store", mesh, tmp_path, max_failures=0)
        assert run.save() == 1
        fill(disk)
        run.listener.when("waits for its store", run.listener.stop)
        assert run.end() == 1, "it is not saved"


# What is changed on its way from the store.


def test_a_flipped_byte_is_never_loaded(
    fault_proxy: Any, s3_url: str, mesh: Mesh, tmp_path: Path
) -> None:
    run = Run(s3_url, mesh, tmp_path)
    assert run.save() == 1
    for operation, key in (("GetObject", r"\.bin$"), ("GetObject", r"manifest\.json$")):
        fault_proxy.inject("flip_in_reply", operation=operation, key=key)
        assert run.check() == 1, f"{key} is read once more"
    assert fault_proxy.faults == {"flip_in_reply": 2}
    fault_proxy.inject("flip_in_reply", operation="GetObject", key=r"\.bin$", times=math.inf)
    with pytest.raises(DamagedCheckpoint, match=r"object 00-a/.*rank-00000.*checksum of bytes \d+"):
        run.check()
    fault_proxy.heal()
    assert run.check() == 1, "the object itself is as it was"
