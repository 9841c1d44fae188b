"""What MLflow tracking costs the controller: how long its other threads stand still, and its calls.

A thread that wakes each millisecond stands for the controller's threads (those that hear the ranks,
say); the gap between two of its wakes is how long such a thread could not run. It is watched while
a run of 600 steps and three stages is tracked: by a thread of the same process, as once was, and by
the process that does it now, with MLflow on a sqlite file and with a server that takes connections
and never answers.

    python benchmarks/tracking_stall.py
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringworld_jobs.spec import JobSpec
from ringworld_platform.tracking import Tracker
from ringworld_platform.tracking_service import TrackingService

STAGES, STEPS = 3, 200
LIMIT_SECONDS = 300.0


def spec_of(mlflow: str) -> JobSpec:
    """A job of three stages."""
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": "stall",
            "data": {"sources": {"books": {"shards": "books"}}},
            "tracking": {"mlflow": mlflow},
            "stages": [
                {
                    "name": f"s{index}",
                    "context_length": 4096 << index,
                    "rope_theta": 1e4,
                    "steps": STEPS,
                    "global_batch_tokens": 16384,
                    "mixture": {"books": 1.0},
                    "learning_rate": {"peak": 1e-3},
                }
                for index in range(STAGES)
            ],
        }
    )


def write_log(path: Path) -> None:
    """The metric log of such a run."""
    with path.open("w", encoding="utf-8") as log:
        for done in range(1, STAGES * STEPS + 1):
            index = (done - 1) // STEPS
            about: dict[str, Any] = {"stage": f"s{index}", "stage_index": index, "time": 1e9 + done}
            about |= {"step": done - index * STEPS, "global_step": done, "attempt": 1}
            series = {f"series_{number}": math.sin(done + number) for number in range(20)}
            record = {"kind": "step", **about, "loss": 9 / done, "tokens": done * 16384, **series}
            log.write(json.dumps(record) + "\n")
            if done % STEPS == 0:
                key = f"{index:02d}-s{index}/step-{STEPS:08d}"
                log.write(json.dumps({"kind": "stage_end", **about, "checkpoint": key}) + "\n")


def watched(action: Callable[[], None]) -> list[float]:
    """Gaps of the ticking thread in seconds while an action goes on."""
    gaps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    action()
    stop.set()
    thread.join()
    return gaps


def main() -> None:
    """Print a line a way to track."""
    print(f"{'':34}{'seconds':>8}{'p99 gap':>10}{'worst gap':>11}{'gaps > 50 ms':>14}")
    show("nothing", lambda folder: time.sleep(5))
    show("a thread, sqlite (as once was)", by_thread)
    show("the process, sqlite", lambda folder: by_process(folder, "auto"))
    with socket.create_server(("127.0.0.1", 0), backlog=64) as frozen:
        uri = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        show("the process, a frozen server", lambda folder: by_process(folder, uri))
    print(f"\nof the calls on the runner's path, the longest: {1000 * max(CALLS):.2f} ms "
          f"(start of the process), median {1e6 * statistics.median(CALLS):.1f} us")  # fmt: skip


CALLS: list[float] = []


def by_thread(folder: Path) -> None:
    """Track from this process, as once was."""
    tracker = Tracker(folder, spec_of("auto"), "stall-1")
    tracker.start()
    tracker.finish("SUCCEEDED", LIMIT_SECONDS)


def by_process(folder: Path, mlflow: str) -> None:
    """Track as the controller does; a frozen server is waited for as long as a runner does."""
    service, spec = TrackingService(), spec_of(mlflow)
    job = timed(lambda: service.track(folder, spec, "stall-1"))
    timed(lambda: service.end(job, "SUCCEEDED"))
    job.ended.wait(LIMIT_SECONDS if mlflow == "auto" else 20.0)
    timed(service.close)


def timed(call: Callable[[], Any]) -> Any:
    """Do something, and note how long it took."""
    began = time.perf_counter()
    found = call()
    CALLS.append(time.perf_counter() - began)
    return found


def show(name: str, action: Callable[[Path], None]) -> None:
    """Print the gaps while a fresh run is tracked."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_log(folder / "metrics.jsonl")
        gaps = watched(lambda: action(folder))
    ordered = sorted(gaps)
    late = sum(gap > 0.05 for gap in gaps)
    p99, worst = ordered[int(0.99 * len(ordered))] * 1000, ordered[-1] * 1000
    print(f"{name:34}{sum(gaps):8.1f}{p99:7.1f} ms{worst:8.0f} ms{late:14}")


if __name__ == "__main__":
    main()
