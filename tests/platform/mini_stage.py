"""A miniature of the train loop for tests: real all-reduces, real checkpoints, no model.

Importable on Ray workers through PYTHONPATH. ``fault.json`` in the store asks for trouble.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ringworld_platform.evaluation_records import answers_file
from ringworld_workers.checkpoint.fence import Fence
from ringworld_workers.guard import TrainingDiverged
from ringworld_workers.store.base import StoreError
from ringworld_workers.store.opening import open_store

CHECKPOINT_EVERY = 5


def run_logged_stage(job: Any, mesh: Any, reporter: Any) -> dict[str, Any]:
    """As real stages do: a checkpoint exists only once the records before it are in the log."""
    return run_stage(job, mesh, reporter, logged=True)


def run_stage(job: Any, mesh: Any, reporter: Any, logged: bool = False) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    stage = job.stage
    saves = Saves(job, mesh.rank)
    origin = saves.newest()
    start = int(origin.removeprefix("step-")) if origin else 0
    first = sum(s.num_steps for s in job.spec.stages[: job.stage_index])

    def record(kind: str, step: int, **more: Any) -> None:
        if mesh.rank == 0:
            about = {"stage": stage.name, "stage_index": job.stage_index, "attempt": job.attempt}
            when = {"step": step, "global_step": first + step, "time": time.time()}
            reporter.metrics({"kind": kind, **about, **when, **more})

    def save(step: int) -> str:
        key, position = f"{saves.folder}/step-{step:08d}", reporter.position()
        if mesh.rank == 0:
            while logged and not reporter.stored(position):
                time.sleep(0.01)
            saves.put(key)
            record("checkpoint", step, key=key, bytes=0)
        return key

    record("stage_start", start, resumed_from=origin, uid=job.run_uid, older=job.take_older)
    computed = 0.0
    for step in range(start + 1, stage.num_steps + 1):
        began = time.monotonic()
        reporter.phase("forward", step)
        if _maybe_fail(job, mesh.rank, step) == "skip_collective":
            continue
        vector = torch.zeros(2 + job.world_size)
        vector[:2] = torch.tensor([1.0, float(reporter.should_stop())])
        vector[2 + mesh.rank] = computed
        dist.all_reduce(vector, group=mesh.control_group)
        assert int(vector[0]) == job.world_size
        if vector[1] > 0:
            return {"status": "stopped", "step": step - 1, "checkpoint": save(step - 1)}
        working = time.monotonic()
        time.sleep(job.spec.optimizer.eps)  # the step's work
        if "slow" in _fault(job) and _fault(job)["rank"] == mesh.rank:
            first, last, seconds = _fault(job)["slow"]
            time.sleep(seconds if first <= step <= last else 0.0)
        computed = time.monotonic() - working
        record(
            "step",
            step,
            loss=1.0 / step,
            step_seconds=time.monotonic() - began,
            ring_compute_by_rank=vector[2:].tolist(),  # of the step before
            tokens_per_second=1000.0,
            sample_ids=[f"{stage.name}:{step}"],
        )
        if step % CHECKPOINT_EVERY == 0:
            save(step)
    key = save(stage.num_steps)
    return {"status": "finished", "step": stage.num_steps, "checkpoint": key}


def evaluate(job: Any, mesh: Any, reporter: Any) -> dict[str, Any]:
    """The real rounds of items over rings, on a task that needs no model."""
    import torch

    from ringworld_workers.evaluate.run import EvaluationRun
    from ringworld_workers.evaluate.task import EvaluationRing

    store = Path(job.sources["books"]).parent
    loaded: Any = None
    ring = EvaluationRing(loaded=loaded, group=None, rank=0, size=1, device=torch.device("cpu"))
    run = EvaluationRun(job, mesh, reporter, ring)
    found = run.task(Squares(store, job, mesh.rank))
    if found is None:
        return {"status": "stopped", "kept": run.kept}
    return {"status": "finished", "evaluations": [found]}


class Squares:
    """Asks for squares; ``deadly.json`` in the store names the item at which a rank dies once."""

    name = "needle"

    def __init__(self, store: Path, job: Any, rank: int) -> None:
        self._answers = store / job.run_id / answers_file(job.stage_index, job.stage_name)
        self._deadly = json.loads((store / "deadly.json").read_text())
        self._at_risk = job.attempt == 1 and rank == self._deadly["rank"]

    def items(self) -> list[Any]:
        from ringworld_workers.evaluate.task import Item

        return [Item(str(number), {"number": number}) for number in range(12)]

    def run(self, items: Any, ring: Any) -> Any:
        given = range(self._deadly["rank"], self._deadly["item"], 2)
        for item in items:
            if self._at_risk and item.facts["number"] >= self._deadly["item"]:
                while not self._are_kept(given):
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)
            yield {"id": item.id, "score": item.facts["number"] ** 2}

    def _are_kept(self, numbers: Any) -> bool:
        kept = self._answers.read_text() if self._answers.exists() else ""
        return all(f'"number":{number},' in kept for number in numbers)

    def summarize(self, records: Any) -> dict[str, float]:
        return {"accuracy": sum(record["score"] for record in records) / 1000}


class Saves:
    """A stage's checkpoints: empty objects. In a store that gangs may share, they are fenced."""

    def __init__(self, job: Any, rank: int) -> None:
        self._store = open_store(job.checkpoint_url)
        self.folder = f"{job.stage_index:02d}-{job.stage.name}"
        about = {"attempt": job.attempt, "stage_index": job.stage_index}
        self._fence = Fence(self._store, run_uid=job.run_uid, **about)
        self._shared = self._store.url.startswith("s3://")
        if self._shared and rank == 0:
            self._fence.take()

    def newest(self) -> str | None:
        names = [info.key.rpartition("/")[2] for info in self._store.list(self.folder)]
        return max(names, default=None)

    def put(self, key: str) -> None:
        if self._shared:
            self._fence.check()
        self._store.put(key, [b""])


def _fault(job: Any) -> dict[str, Any]:
    store = Path(job.spec.data.cache).parent
    try:
        return dict(json.loads((store / "fault.json").read_text()))
    except FileNotFoundError:
        return {}


def _maybe_fail(job: Any, rank: int, step: int) -> str | None:
    fault = _fault(job)
    if "kind" not in fault:
        return None
    if step != fault["step"] or job.attempt > fault.get("attempts", 1):
        return None
    if fault["kind"] == "late":
        # The others notice long before the rank itself can say what has happened.
        time.sleep(float(rank == fault["rank"]))
        what = "injected late" if rank == fault["rank"] else "Connection closed by peer"
        raise RuntimeError(f"{what} at step {step}")
    if rank != fault["rank"]:
        return None
    if fault["kind"] == "wait":
        # However slow the machine is, the run is still at work when the test has done its part.
        while not Path(fault["until"]).exists():
            time.sleep(0.02)
        return None
    if fault["kind"] == "raise":
        raise RuntimeError(f"injected at step {step}")
    if fault["kind"] == "value":
        raise ValueError(f"row {step} has no tokens; rebuild the dataset")
    if fault["kind"] == "nan" and step not in job.skip_steps:
        _diverge(step)
    if fault["kind"] == "memory":
        raise MemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    if fault["kind"] == "store":
        raise StoreError("get", "s3://b/writer.json", "nothing answers there", transient=True)
    if fault["kind"] == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault["kind"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault["kind"] == "loop":
        _wait_for_nothing()
    if fault["kind"] == "hold":
        # C code that never lets go of Python's lock: no other thread of this process can answer.
        ctypes.PyDLL(None).sleep(120)
    return str(fault["kind"])


def _diverge(step: int) -> None:
    facts = {"kind": "nan", "action": "rollback", "step": step, "skip_steps": [step]}
    raise TrainingDiverged(f"loss_text is nan at step {step} of stage 1k", facts)


def _wait_for_nothing() -> None:
    while True:
        time.sleep(0.05)


def build(recipe: Path, cache: Path, on_progress: Any) -> Any:
    if recipe.name == "broken.yaml":
        raise ValueError(f"{recipe}: video 7 has no frames; remove it")
    on_progress("text", 1, 2)
    if recipe.name == "frozen.yaml":
        os.kill(os.getpid(), signal.SIGSTOP)
    if recipe.name == "long.yaml":
        time.sleep(5.0)
    return SimpleNamespace(
        dir=cache / "digest",
        datasets={"books": cache / "digest" / "books"},
        tokenizer_size=512,
        codebook_size=0,
        cached=False,
    )
