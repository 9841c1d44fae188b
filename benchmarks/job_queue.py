"""Fifty jobs on a cluster of four CPUs: mixed priorities and sizes, some coming while others run.

Real controller, gangs, placement groups and all-reduces; the training loop is that of the tests,
without a model. Checks what the queue promises, and prints how long it all took:

    python benchmarks/job_queue.py > benchmarks/results/job_queue-DATE.md
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ringworld_platform.client import Client
from ringworld_platform.run_state import TERMINAL
from ringworld_platform.run_states import RunStates

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "platform"))
from mini_jobs import mini_client, mini_cluster, mini_job  # noqa: E402

CPUS = 4
SIZES = (1, 1, 1, 2, 2, 4)
PRIORITIES = (0, 0, 0, 1, 2)


@dataclass(frozen=True, slots=True)
class Asked:
    """A job of the benchmark."""

    run_id: str
    workers: int
    priority: int
    submitted: float


def begun(client: Client, run_id: str) -> float:
    """When a run's first gang had its workers, seconds since the epoch."""
    events = client.events(run_id)
    return next(float(event["time"]) for event in events if event.get("state") == "RUNNING")


def overtaken(asked: list[Asked], starts: dict[str, float]) -> list[str]:
    """Runs that waited while one of their size that comes after them in the line was started."""
    found = []
    for first in asked:
        for second in asked:
            ahead = (-first.priority, first.submitted) < (-second.priority, second.submitted)
            # Two that come within a second of each other may be seen in either order.
            waited = first.submitted + 1.0 < starts[second.run_id]
            late = starts[second.run_id] < starts[first.run_id] - 0.5
            if ahead and waited and late and first.workers <= second.workers:
                found.append(f"{second.run_id} before {first.run_id}")
    return found


def controller_process(store: Path, run_id: str) -> psutil.Process:
    """The controller's process, from the state of a run that it owns."""
    owner = RunStates(store).get(run_id).owner
    if owner is None:
        raise SystemExit(f"{run_id} has no owner")
    return psutil.Process(owner.pid)


def measure(client: Client, store: Path, jobs: int, seed: int) -> dict[str, Any]:
    """Submit, watch to the end, and sum up."""
    draw = random.Random(seed)
    asked: list[Asked] = []
    began = time.time()
    answers: list[float] = []
    silent: set[str] = set()
    process: psutil.Process | None = None
    while True:
        if len(asked) < jobs and (len(asked) < jobs // 2 or draw.random() < 0.5):
            workers, priority = draw.choice(SIZES), draw.choice(PRIORITIES)
            name = f"job-{len(asked):02d}"
            spec = mini_job(
                store,
                name,
                stages=(("1k", workers, draw.randint(2, 40)),),
                step_seconds=0.05,
                workers=(workers, workers),
                priority=priority,
            )
            asked.append(Asked(client.submit(spec), workers, priority, time.time()))
            if len(asked) >= jobs // 2:
                time.sleep(1.0)
            continue
        process = process or controller_process(store, asked[-1].run_id)
        asking = time.perf_counter()
        statuses = {status["run_id"]: status for status in client.list()}
        answers.append(time.perf_counter() - asking)
        for one in asked:
            status = statuses[one.run_id]
            waits = status["state"] in ("QUEUED", "WAITING")
            if waits and time.time() - one.submitted > 5.0 and "needs" not in status["reason"]:
                silent.add(one.run_id)
        if len(asked) == jobs and all(s["state"] in TERMINAL for s in statuses.values()):
            break
        time.sleep(0.5)
    seconds = time.time() - began
    used = process.cpu_times()
    starts = {one.run_id: begun(client, one.run_id) for one in asked}
    events = [event for one in asked for event in client.events(one.run_id)]
    records = [RunStates(store).get(one.run_id) for one in asked]
    return {
        "jobs that succeeded": sum(record.state == "SUCCEEDED" for record in records),
        "seconds from the first submission to the last end": round(seconds, 1),
        "runs that made way through a checkpoint": sum(e["kind"] == "preempted" for e in events),
        "restarts counted, failures": (
            f"{sum(record.restarts for record in records)}, "
            f"{sum(event['kind'] == 'failure' for event in events)}"
        ),
        "runs overtaken by one no smaller that stood behind them": len(overtaken(asked, starts)),
        "runs that waited for 5 s without a word of what is missing": len(silent),
        "`list` of all runs, median and longest ms": (
            f"{1e3 * statistics.median(answers):.0f}, {1e3 * max(answers):.0f}"
        ),
        "controller's share of a core, %": round(100 * (used.user + used.system) / seconds, 1),
        "controller's memory, MiB": process.memory_info().rss >> 20,
    }


def main() -> None:
    """Run it in a local cluster of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ringworld-queue-") as folder, mini_cluster(CPUS):
        store = Path(folder)
        load = os.getloadavg()[0]
        with mini_client(store) as client:
            figures = measure(client, store, options.jobs, options.seed)
    print(f"# {options.jobs} jobs in the queue of {CPUS} CPUs\n")
    print(f"`python {' '.join(sys.argv)}`, {time.strftime('%Y-%m-%d')}, on {os.cpu_count()} cores")
    print(f"(load {load:.0f} when it began, {os.getloadavg()[0]:.0f} when it ended).\n")
    print("| | |\n| --- | --- |")
    for what, figure in figures.items():
        print(f"| {what} | {figure} |")


if __name__ == "__main__":
    main()
