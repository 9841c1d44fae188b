"""What a controller costs with 200 jobs and 1,000 workers that report each second.

The controller actor is the real one, with its runners, run folders, line of jobs and a placement
group a gang. The workers are ranks that share a few processes (``load_workers``): a machine of two
cores holds no thousand of them. They speak as real ones do, one call of Ray's a question.

    python benchmarks/controller_load.py --out benchmarks/results/controller_load-DATE

Goals: less than 300 MB, less than a fifth of a core, answers within 100 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from ringworld_platform.client import Client
from ringworld_platform.run_records import METRICS_FILE, read_lines
from ringworld_platform.run_state import TERMINAL, JobRecord, RunState
from ringworld_platform.run_states import RunStates
from ringworld_platform.runner_config import RunnerConfig

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "platform")]
import mini_jobs  # noqa: E402
from job_queue import controller_process  # noqa: E402
from load_workers import LoadHost, LoadWorkers  # noqa: E402

GOALS = {"memory, MB": 300.0, "share of a core, %": 20.0, "status, p99 ms": 100.0}
FAILING = 10
PAUSE_SECONDS = 0.25


def finished_runs(store: Path, number: int) -> None:
    """Leave the folders of runs that ended long ago."""
    states = RunStates(store)
    for n in range(number):
        states.create(
            f"old-{n}",
            lambda run_id, path, n=n: JobRecord(  # type: ignore[misc]
                job=f"old-{n}",
                run_id=run_id,
                state=RunState.SUCCEEDED,
                reason="all 1 stages are done",
                num_stages=1,
                run_folder=str(path),
                submitted=time.time() - 1e6 + n,
                spec_digest="-",
            ),
        )


def percentile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def answers(what: list[float]) -> dict[str, float]:
    """Median, 99th percentile and longest of some waits, in ms."""
    return {
        "median ms": round(1e3 * statistics.median(what), 1),
        "p99 ms": round(1e3 * percentile(what, 0.99), 1),
        "longest ms": round(1e3 * max(what), 1),
    }


def thread_seconds(process: psutil.Process) -> dict[str, float]:
    """CPU seconds by kind of thread."""
    found: dict[str, float] = {}
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip().rstrip("0123456789.-")
            used = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue
        found[name] = found.get(name, 0.0) + used
    return found


def submit_all(
    client: Client, store: Path, options: argparse.Namespace
) -> tuple[list[str], list[float]]:
    """Submit the jobs; returns the runs and the seconds of each submission."""
    runs, took = [], []
    for number in range(options.jobs + options.waiting):
        spec = mini_jobs.mini_job(
            store,
            f"load-{number:03d}",
            stages=(("1k", options.ranks, 100_000),),
            workers=(options.ranks, options.ranks),
        )
        asking = time.perf_counter()
        runs.append(client.submit(spec))
        took.append(time.perf_counter() - asking)
    return runs, took


def await_running(client: Client, number: int, seconds: float) -> float:
    """Seconds until so many runs train."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        training = [s for s in client.list() if s["state"] == "RUNNING" and s["step"] > 0]
        if len(training) >= number:
            return time.monotonic() - began
        time.sleep(1.0)
    others = [s["reason"] for s in client.list() if s not in training]
    raise SystemExit(f"{len(training)} of {number} runs train after {seconds:g} s; {others[:3]}")


def observe(client: Client, store: Path, runs: list[str], seconds: float) -> dict[str, Any]:
    """What the controller uses while it is asked now and then."""
    process = controller_process(store, runs[0])
    before, threads_before = process.cpu_times(), thread_seconds(process)
    began = time.monotonic()
    status_waits, list_waits, behind = [], [], []
    turn = 0
    while time.monotonic() - began < seconds:
        turn += 1
        asking = time.perf_counter()
        status = client.status(runs[turn % len(runs)])
        status_waits.append(time.perf_counter() - asking)
        behind.append(status["step"])
        if turn % 4 == 0:
            asking = time.perf_counter()
            client.list()
            list_waits.append(time.perf_counter() - asking)
        time.sleep(PAUSE_SECONDS)
    lasted = time.monotonic() - began
    used, threads = process.cpu_times(), thread_seconds(process)
    memory = process.memory_full_info()
    by_thread = {
        name: round(100 * (threads[name] - threads_before.get(name, 0.0)) / lasted, 2)
        for name in threads
    }
    return {
        "memory, MB": round(memory.rss / 1e6),
        "memory without shared pages, MB": round(memory.uss / 1e6),
        "share of a core, %": round(
            100 * (used.user + used.system - before.user - before.system) / lasted, 1
        ),
        "of this in the kernel, %": round(100 * (used.system - before.system) / lasted, 1),
        "threads": process.num_threads(),
        "status": answers(status_waits),
        "list of all runs": answers(list_waits),
        "share of a core by threads, %": dict(
            sorted(((n, s) for n, s in by_thread.items() if s > 0.2), key=lambda pair: -pair[1])
        ),
    }


def failures(client: Client, run: str) -> list[dict[str, Any]]:
    """The events of a run that tell of failures."""
    return [event for event in client.events(run) if event["kind"] == "failure"]


def let_fail(client: Client, hosts: list[Any], runs: list[str]) -> list[float]:
    """Seconds from an exception in a rank to the event that tells of it."""
    ray.get([host.fail.remote(runs) for host in hosts])
    found = []
    for run in runs:
        events = mini_jobs.wait_until(partial(failures, client, run), f"{run} fails", 200.0)
        raised = re.search(r"asked to fail, at ([0-9.]+[0-9])", events[0]["text"])
        if raised is None:
            raise SystemExit(f"an unexpected failure: {events[0]['text']}")
        found.append(float(events[0]["time"]) - float(raised[1]))
    return found


def stop_all(client: Client, runs: list[str]) -> float:
    """Seconds until all runs have stopped."""
    began = time.monotonic()
    for run in runs:
        client.stop(run)
    while not all(s["state"] in TERMINAL for s in client.list()):
        if time.monotonic() - began > 300:
            raise SystemExit("not all runs have stopped after 300 s")
        time.sleep(0.5)
    return time.monotonic() - began


def wrong_logs(store: Path, runs: list[str]) -> list[str]:
    """Runs whose metric log lacks a step, or holds one twice."""
    wrong = []
    for run in runs:
        records = read_lines(store / run / METRICS_FILE).records
        steps = [
            (record["attempt"], record["step"]) for record in records if record["kind"] == "step"
        ]
        state = RunStates(store).get(run)
        for attempt in sorted({attempt for attempt, _ in steps}):
            mine = [step for a, step in steps if a == attempt]
            ends_early = attempt == state.attempt and mine[-1] != state.step
            if ends_early or mine != list(range(1, len(mine) + 1)):
                wrong.append(f"{run} attempt {attempt}")
    return wrong


def measure(options: argparse.Namespace, store: Path) -> dict[str, Any]:
    """The whole test in a cluster that runs."""
    finished_runs(store, options.finished)
    made: Any = ray.remote(LoadHost)
    hosts = [
        made.options(name=f"load-host-{n}", num_cpus=0, max_concurrency=10_000).remote()
        for n in range(options.hosts)
    ]
    ray.get([host.fail.remote([]) for host in hosts])
    workers = LoadWorkers([f"load-host-{n}" for n in range(options.hosts)], options.profile)
    client = Client.attach(store, runner=RunnerConfig(workers=workers))
    runs, submitted = submit_all(client, store, options)
    started = await_running(client, options.jobs, options.patience)
    time.sleep(5.0)
    training = runs[: options.jobs]
    found: dict[str, Any] = {
        "jobs": options.jobs,
        "workers": options.jobs * options.ranks,
        "jobs in the line": options.waiting,
        "runs that ended before": options.finished,
        "seconds from the last submission until all train": round(started, 1),
        "submission": answers(submitted),
        **observe(client, store, runs, options.seconds),
    }
    found["failure noticed"] = answers(let_fail(client, hosts, training[:FAILING]))
    found["seconds until all have stopped"] = round(stop_all(client, runs), 1)
    found["logs with a step lost or doubled"] = wrong_logs(store, training)
    client.shutdown()
    return found


def text(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The result as Markdown."""
    lines = [
        f"# A controller of {found['jobs']} jobs and {found['workers']} workers\n",
        f"`python benchmarks/controller_load.py`, {time.strftime('%Y-%m-%d')}, on "
        f"{os.cpu_count()} cores, {options.seconds:g} s; the ranks share {options.hosts} processes "
        "and report each second.",
        f"Load {found['load'][0]:.0f} when it began, {found['load'][1]:.0f} when it ended.\n",
        "| | |\n| --- | --- |",
    ]
    for name, figure in found.items():
        if name in ("load", "share of a core by threads, %"):
            continue
        shown = figure
        if isinstance(figure, dict):
            shown = ", ".join(f"{what} {value}" for what, value in figure.items())
        elif isinstance(figure, list):
            shown = ", ".join(map(str, figure)) or "none"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it in a local cluster of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=5, help="workers of each")
    parser.add_argument("--waiting", type=int, default=0, help="more jobs, which find no room")
    parser.add_argument("--finished", type=int, default=0, help="runs that ended before")
    parser.add_argument("--hosts", type=int, default=4, help="processes that play the workers")
    parser.add_argument("--seconds", type=float, default=60.0, help="of observation")
    parser.add_argument("--patience", type=float, default=400.0, help="seconds for all to start")
    parser.add_argument("--profile", type=Path, help="folder for profiles of the runners")
    parser.add_argument("--out", type=Path, help="result without its ending, .md and .json")
    options = parser.parse_args()
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
    # The ranks of real runs are elsewhere: here they and the controller share the cores alike.
    os.environ["RAY_worker_niceness"] = "0"
    # Ray starts a process for each CPU that it is told of, else.
    os.environ["RAY_prestart_worker_first_driver"] = "0"
    os.environ["RAY_enable_worker_prestart"] = "0"
    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(prefix="ringworld-load-") as folder,
        mini_jobs.mini_cluster(options.jobs * options.ranks),
    ):
        found = measure(options, Path(folder))
    found["load"] = [load, os.getloadavg()[0]]
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text(found, options))
    print(text(found, options))
    print(json.dumps(found["share of a core by threads, %"], indent=1))


if __name__ == "__main__":
    main()
