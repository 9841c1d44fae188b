"""What all tests share: gangs of ranks, one thread a process, one Ray runtime at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

    from ringworld_platform.local_s3 import LocalS3

# Before torch is imported, here or in what tests start: ranks and pytest's own workers share the
# cores, and more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers niceness 15. Beside tests that compute on the other core they would get a
# thirtieth of one, and a ring waits for its slowest rank.
os.environ.setdefault("RAY_worker_niceness", "0")
# A shell's background jobs ignore Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """Hand out files, but all that start Ray as if they were one: they mostly wait.

    The first of them is the first file of all, so one worker runs them from the start.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "ray" if file in with_ray else file

    with_ray = {
        path.relative_to(config.rootpath).as_posix()
        for path in (config.rootpath / "tests").rglob("test_*.py")
        if "pytest.mark.ray" in path.read_text(encoding="utf-8")
    }
    return OneRay(config, log)


PRELOADED = [
    "ringworld_workers.engine.deepspeed_engine",
    "deepspeed.runtime.zero.muon.original_muon",
    "ringworld_workers.checkpoint.writer",
    "ringworld_workers.checkpoint.reader",
    "ringworld_workers.train_loop",
    "ringworld_workers.testing",
    "pytest",  # a rank loads its function's test module
]


@pytest.fixture(scope="session")
def run_gang() -> Callable[..., list[Any]]:
    """``run_distributed`` with ranks forked from one server that has done the slow imports.

    A process may hold one engine only, and torch and deepspeed take seconds to import. The server
    starts no thread and initialises no process group, so its forks are as good as fresh.
    """
    from ringworld_workers import testing  # imports torch, which many tests do without

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(
        fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90.0
    ) -> list[Any]:
        target = testing._locate(fn)
        with tempfile.TemporaryDirectory(prefix="ringworld-test-") as folder:
            processes = [
                context.Process(
                    target=testing._child,
                    args=(rank, world_size, target, args, folder, timeout),
                    daemon=True,
                )
                for rank in range(world_size)
            ]
            for process in processes:
                process.start()
            try:
                late = testing._join(processes, Path(folder), timeout)
            finally:
                for process in processes:
                    if process.is_alive():
                        process.kill()
                    process.join(5)
            return testing._collect(Path(folder), fn.__qualname__, processes, late, timeout)

    return run


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A real S3 server of this test process alone, with the bucket ``runs``."""
    from ringworld_platform.local_s3 import LocalS3

    with LocalS3(tmp_path_factory.mktemp("s3")) as server:
        server.start("runs")
        yield server


@pytest.fixture
def s3_url(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own on that server; the environment has the way there and the credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://runs/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Any]:
    """Writes a committed checkpoint of given tensors, cut for any number of ranks."""
    import numpy as np
    from awscrt.checksums import crc32c

    from ringworld_workers.checkpoint import layout

    def write(
        store: Any,
        tensors: Mapping[str, Any],
        *,
        step: int = 8,
        stage: str = "4k",
        stage_index: int = 0,
        ranks: int = 2,
        run_id: str = "quickstart-1",
        final: bool = False,
        name: str = "0000abcd",
    ) -> layout.CheckpointRef:
        """Moments are the weights' halves and squares; object names end in ``name``."""
        folder = layout.folder_of(stage_index, stage, step)
        values: dict[str, Any] = {
            key: np.asarray(value, dtype=np.float32) for key, value in tensors.items()
        }
        objects = []
        for rank in range(ranks):
            ranges: list[layout.StoredRange] = []
            parts: list[bytes] = []
            offset = 0
            for tensor, whole in values.items():
                flat = whole.reshape(-1)
                start, stop = (flat.size * n // ranks for n in (rank, rank + 1))
                share = flat[start:stop]
                kinds = {"param": share, "exp_avg": share / 2, "exp_avg_sq": share**2}
                for kind, data in kinds.items() if share.size else ():
                    raw = data.tobytes()
                    cuts = range(0, len(raw), layout.CHUNK_BYTES)
                    sums = tuple(crc32c(raw[cut : cut + layout.CHUNK_BYTES]) for cut in cuts)
                    ranges.append(
                        layout.StoredRange(
                            tensor, kind, start, share.size, offset, len(raw), "float32", sums
                        )
                    )
                    parts.append(raw)
                    offset += len(raw)
            key = f"{folder}/rank-{rank:05d}-{name}.bin"
            store.put(key, parts)
            objects.append(layout.StoredObject(key, offset, tuple(ranges)))
        shapes = {key: value.shape for key, value in values.items()}
        manifest = layout.Manifest(
            run_id=run_id,
            attempt=1,
            world_size=ranks,
            mesh={"sequence_parallel": ranks, "heads": 1, "data_parallel": 1},
            parameter_digest=layout.parameter_digest(shapes),
            tensors=shapes,
            objects=tuple(objects),
            optimizer=layout.OptimizerState(
                "adamw",
                step,
                (
                    layout.GroupState("decay", 1e-3, 0.1),
                    layout.GroupState("no_decay", 1e-3, 0.0),
                ),
            ),
            state=layout.TrainState(
                stage=stage,
                stage_index=stage_index,
                step=step,
                tokens=step * 1024,
                cursor=step * 4,
                rng=None,
                learning_rate=1e-3,
                spec_digest="0" * 64,
                metrics={"loss_text": 2.5},
                final=final,
            ),
        )
        store.put(f"{folder}/{layout.MANIFEST}", [manifest.to_json()])
        return layout.CheckpointRef(store.url, stage, stage_index, step, folder)

    return write
