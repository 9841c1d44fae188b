"""Gangs of processes that each build one engine, without paying DeepSpeed's import for each."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringworld_workers import testing

PRELOADED = [
    "ringworld_workers.engine.deepspeed_engine",
    "deepspeed.runtime.zero.muon.original_muon",
    "ringworld_workers.checkpoint.writer",
    "ringworld_workers.checkpoint.reader",
    "ringworld_workers.train_loop",
    "ringworld_workers.testing",
]


@pytest.fixture(scope="session")
def run_gang() -> Callable[..., list[Any]]:
    """``run_distributed`` with ranks forked from one server that has done the slow imports.

    A process may hold one engine only, and torch and deepspeed take seconds to import. The server
    starts no thread and initialises no process group, so its forks are as good as fresh.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
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
