"""Small jobs for ``mini_stage``, a client on a local Ray that runs them, and waiting."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringworld_jobs.spec import JobSpec
from ringworld_platform.client import Client
from ringworld_platform.cluster import local_cluster
from ringworld_platform.runner_config import RunnerConfig

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CONFIG = RunnerConfig(
    stage_function="mini_stage:run_stage",
    evaluate_function="mini_stage:evaluate",
    prepare_function="mini_stage:build",
)
LOGGED = replace(CONFIG, stage_function="mini_stage:run_logged_stage")


def worker_environment() -> dict[str, str]:
    """What Ray's workers need to find this folder's modules and ours."""
    roots = [REPOSITORY / name for name in ("jobs", "model", "platform", "workers")]
    paths = os.pathsep.join(str(path) for path in [*roots, HERE])
    return {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@contextmanager
def mini_cluster(num_cpus: int) -> Iterator[None]:
    """A local Ray whose workers find ``mini_stage``."""
    with local_cluster(num_cpus=num_cpus, env_vars=worker_environment()):
        yield


@contextmanager
def mini_client(runs: Path) -> Iterator[Client]:
    """A client of a controller whose gangs run ``mini_stage``."""
    made = Client.attach(runs, runner=CONFIG)
    yield made
    made.shutdown()


def mini_job(
    store: Path,
    name: str = "mini",
    *,
    stages: tuple[tuple[str, int, int], ...] = (("1k", 1, 6), ("4k", 2, 6)),
    step_seconds: float = 0.01,
    workers: tuple[int, int] = (1, 64),
    priority: int = 0,
    recipe: str | None = None,
    prewarm: str = "auto",
    **recovery: Any,
) -> JobSpec:
    """A job of (name, ring size, steps) stages.

    Args:
        store: folder of its runs.
        name: of the job.
        stages: name, ring size and steps of each.
        step_seconds: time of a step; the optimizer's eps carries it to ``mini_stage``.
        workers: least and most.
        priority: in the line.
        recipe: of its data; ``mini_stage.build`` knows some names.
        prewarm: when the next stage's nodes are asked for.
        recovery: fields of the spec's ``recovery``.
    """
    least, most = workers
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": name,
            "data": {
                "recipe": recipe,
                "cache": str(store / "cache"),
                "sources": {} if recipe else {"books": {"shards": str(store / "books")}},
            },
            "optimizer": {"eps": step_seconds},
            "resources": {
                "accelerator": "cpu",
                "workers": {"min": least, "max": most},
                "priority": priority,
                "prewarm": prewarm,
            },
            "checkpoint": {"store": f"file://{store}"},
            "tracking": {"mlflow": "off"},
            "recovery": recovery,
            "stages": [
                {
                    "name": stage,
                    "context_length": 1024,
                    "rope_theta": 1e4,
                    "steps": steps,
                    "global_batch_tokens": 1024,
                    "mesh": {"sequence_parallel": ring, "data_parallel": 1},
                    "mixture": {"books": 1.0},
                    "learning_rate": {"peak": 1e-3},
                }
                for stage, ring, steps in stages
            ],
        }
    )


def wait_until(check: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """What ``check`` gives once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def hold(store: Path, step: int, rank: int = 0, attempts: int = 1) -> Path:
    """Have a rank of the store's runs wait in a step; it goes on once the file that this names is.

    A test then has all the time that it needs to do what is to happen before that step.
    """
    until = store / "go-on"
    about = {"rank": rank, "step": step, "attempts": attempts, "until": str(until)}
    (store / "fault.json").write_text(json.dumps({"kind": "wait", **about}))
    return until
