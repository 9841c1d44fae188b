"""How soon a run goes on after a SIGKILL, and whether kills leave a trace in what it computes.

    .venv/bin/python benchmarks/recovery.py             # 5 kills of a worker: time to the next step
    .venv/bin/python benchmarks/recovery.py --kills 25  # kills at any moment, then the same losses?

A real job (a tiny decoder under ZeRO-1, a ring of two workers, fp32 on CPU) runs on a Ray of its
own. With --kills, workers are killed in steps, in saves, in restores and while gangs start, and
the controller now and then; an undisturbed run of the same job says what every step's rows and
loss must be. Writes benchmarks/results/recovery-<date>.md and .json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from recovery_report import write

from ringworld_jobs.spec import JobSpec
from ringworld_platform.client import Client
from ringworld_platform.cluster import local_cluster
from ringworld_platform.run_records import read_lines

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "platform"))
from mini_books import VOCABULARY, write_books  # noqa: E402

CONTEXT = 128
WAIT_SECONDS = 600.0
MOMENTS = ("step", "save", "start", "any", "controller")


def main() -> None:
    """Run what is asked for and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured kills of a worker")
    parser.add_argument("--kills", type=int, default=0, help="kills at any moment, in one run")
    parser.add_argument("--steps", type=int, default=6000, help="of the run with --kills")
    parser.add_argument("--every", type=int, default=5, help="steps between its checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    # Whoever ends this program ends its Ray with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory() as place, local_cluster(num_cpus=2):
        folder = Path(place)
        write_books(folder / "books", train=400, held_out=4, longest=299)
        if options.kills:
            found = {"kills": kill_often(folder, options)}
        else:
            found = {"restarts": measure_restarts(folder, options.rounds)}
    write(options.results, found)


# --- how soon it goes on ---


def measure_restarts(folder: Path, rounds: int) -> dict[str, Any]:
    """Kill a worker in the middle of steps, again and again."""
    every = 50
    client = Client.attach(folder / "runs", one_shot=True)
    run_id = client.submit(job(folder, "restarts", steps=10**6, every=every))
    log = RunLog(client, run_id)
    measured = []
    for number in range(rounds):
        measured.append(measure_restart(log, every, number))
        say(f"{measured[-1]['seconds']:.1f} s, lost {measured[-1]['lost_steps']} steps")
    client.stop(run_id)
    client.wait(run_id, timeout_seconds=WAIT_SECONDS)
    return {"every_steps": every, "measured": measured}


def measure_restart(log: RunLog, every: int, number: int) -> dict[str, Any]:
    """Where the time from a kill to the next step goes, and what work is lost."""
    attempt = log.until(lambda: log.records("step"), "a step")[-1]["attempt"]
    begun = log.steps(attempt)[0]
    # Well into the steps, and at another distance from the last save each time.
    goal = begun["step"] + every + every // 2 + 7 * number
    log.until(lambda: log.steps(attempt)[-1]["step"] >= goal, f"step {goal}")
    pid = log.status()["workers"][number % 2]["pid"]
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    step = log.until(lambda: log.steps(attempt + 1), "a step of the next gang")[0]
    (failure,) = [e for e in log.events("failure") if e["time"] >= killed - 0.5]
    states = [e for e in log.events("state") if e["time"] > failure["time"]]
    starting = next(e for e in states if e["text"].endswith(": starting"))
    running = next(e for e in states if e["text"].endswith(f"attempt {attempt + 1}"))
    (start,) = [r for r in log.records("stage_start") if r["attempt"] == attempt + 1]
    last = log.steps(attempt)[-1]["step"]
    moments = [killed, *(e["time"] for e in (failure, starting, running, start, step))]
    parts = ("notice", "clear", "start_workers", "load", "first_step")
    spent = {name: moments[i + 1] - moments[i] for i, name in enumerate(parts)}
    return {"seconds": step["time"] - killed, **spent, "lost_steps": last - start["step"]}


# --- whether kills leave a trace ---


def kill_often(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run a job undisturbed, then the same with kills, and compare every step."""
    client = Client.attach(folder / "runs", one_shot=True)
    calm = client.submit(job(folder, "calm", steps=options.steps, every=options.every))
    expect_success(client.wait(calm, timeout_seconds=None))
    expected = RunLog(client, calm)
    calm_seconds = expected.last("step")["time"] - expected.records("stage_start")[0]["time"]
    say(f"undisturbed: {options.steps} steps in {calm_seconds:.0f} s")

    run_id = client.submit(job(folder, "killed", steps=options.steps, every=options.every))
    log = RunLog(client, run_id)
    moments = random.Random(options.seed)
    kills = []
    began = time.time()
    while len(kills) < options.kills:
        kind = MOMENTS[len(kills) % len(MOMENTS)]
        done = kills[-1]["attempt"] if kills else 0
        kills.append(kill_once(log, folder, kind, moments, done))
        say(f"kill {len(kills)}: {kills[-1]['target']} in {kills[-1]['phase']}")
    expect_success(client.wait(run_id, timeout_seconds=None))
    return {
        "steps": options.steps,
        "every_steps": options.every,
        "seed": options.seed,
        "kills": kills,
        "attempts": log.status()["attempt"],
        "undisturbed_seconds": calm_seconds,
        "seconds": log.last("step")["time"] - began,
        **compare(expected, log),
    }


def kill_once(
    log: RunLog, folder: Path, kind: str, moments: random.Random, after: int
) -> dict[str, Any]:
    """SIGKILL a process of the run's at a moment of this kind; ``after`` is the last attempt's."""
    store = folder / "runs" / log.run_id / "checkpoints"
    if kind in ("step", "save", "controller"):
        log.until(lambda: log.records("step") and log.last("step")["attempt"] > after, "a step")
        time.sleep(moments.uniform(0.0, 1.5))
    if kind == "save":
        quick(lambda: unfinished_save(store), "a save on its way")
    if kind == "start":
        quick(lambda: processes("ray::RingWorker"), "a gang that starts")
        time.sleep(moments.uniform(0.0, 4.0))
    if kind == "any":
        time.sleep(moments.uniform(0.0, 10.0))
    target = "controller" if kind == "controller" else "worker"
    name = "ray::Controller" if kind == "controller" else "ray::RingWorker"
    while True:
        found = quick(lambda: processes(name), name)
        attempt, phase = phase_of(log)
        with contextlib.suppress(ProcessLookupError):
            os.kill(moments.choice(found), signal.SIGKILL)
            about = {"target": target, "wanted": kind, "phase": phase, "attempt": attempt}
            return {**about, "time": time.time()}


def phase_of(log: RunLog) -> tuple[int, str]:
    """Attempt and doings of the run, as far as its state file tells."""
    status = json.loads((Path(log.folder) / "state.json").read_text())
    if status["state"] == "SUCCEEDED":
        raise SystemExit("the run has ended before the last kill: give it more --steps")
    workers = status["workers"]
    if workers:
        return status["attempt"], f"{workers[0]['phase']} of step {workers[0]['step']}"
    return status["attempt"], f"{status['state'].lower()}, no workers yet"


def unfinished_save(store: Path) -> bool:
    """Whether a checkpoint has objects and no manifest."""
    saves = sorted(store.glob("*/step-*"))
    return bool(saves) and not (saves[-1] / "manifest.json").exists()


def compare(expected: RunLog, found: RunLog) -> dict[str, Any]:
    """Every step of every attempt against the undisturbed run's: rows and loss."""
    wanted = {record["step"]: record for record in expected.records("step")}
    steps = found.records("step")
    worst = max(abs(record["loss"] - wanted[record["step"]]["loss"]) for record in steps)
    rows = expected.samples()
    done = {record["step"] for record in steps}
    final_wanted, final = expected.last("validation"), found.last("validation")
    scores = [key for key in final_wanted if key.startswith("loss")]
    return {
        "records": len(steps),
        "steps_done": len(done),
        "none_left_out": done == set(wanted),
        "redone_steps": len(steps) - len(done),
        "same_rows": all(rows[step] == ids for step, ids in found.samples_of_all()),
        "worst_loss_difference": worst,
        "worst_validation_difference": max(abs(final[k] - final_wanted[k]) for k in scores),
        "final_loss": found.last("step")["loss"],
        "undisturbed_final_loss": expected.last("step")["loss"],
    }


# --- the job, and its logs ---


def job(folder: Path, name: str, *, steps: int, every: int) -> JobSpec:
    """A tiny decoder on a ring of two workers."""
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": name,
            "model": {
                "hidden_size": 32,
                "ffn_size": 48,
                "num_layers": 2,
                "num_heads": 4,
                "text_vocab_size": VOCABULARY,
                "vision": {"codebook_size": 16},
            },
            "data": {"sources": {"books": {"shards": str(folder / "books")}}},
            "resources": {"accelerator": "cpu", "workers": {"min": 2, "max": 2}},
            "checkpoint": {"store": f"file://{folder}/runs", "every": f"{every} steps"},
            "tracking": {"mlflow": "off"},
            "recovery": {"max_restarts": 1000},
            "stages": [
                {
                    "name": "only",
                    "context_length": CONTEXT,
                    "rope_theta": 1e4,
                    "steps": steps,
                    "global_batch_tokens": CONTEXT,
                    "mesh": {"sequence_parallel": 2, "data_parallel": 1},
                    "mixture": {"books": 1.0},
                    "validation_rows": 4,
                    "learning_rate": {"peak": 1e-3},
                }
            ],
        }
    )


class RunLog:
    """A run's logs, read from its folder as they grow."""

    def __init__(self, client: Client, run_id: str) -> None:
        """Take the run."""
        self.client, self.run_id = client, run_id
        self.folder = client.status(run_id)["run_folder"]
        self._read: dict[str, tuple[int, list[dict[str, Any]]]] = {}

    def status(self) -> dict[str, Any]:
        """Its state; a controller that starts anew is waited for."""
        return self.client.status(self.run_id)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Its metric records of a kind."""
        return [r for r in self._lines("metrics.jsonl") if r.get("kind") == kind]

    def steps(self, attempt: int) -> list[dict[str, Any]]:
        """The steps of one gang."""
        return [record for record in self.records("step") if record["attempt"] == attempt]

    def last(self, kind: str) -> dict[str, Any]:
        """The newest record of a kind."""
        return self.records(kind)[-1]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Its events of a kind."""
        return [event for event in self._lines("events.jsonl") if event["kind"] == kind]

    def samples_of_all(self) -> list[tuple[int, list[str]]]:
        """The rows of every step that was done, redone ones too."""
        return [(line["step"], line["sample_ids"]) for line in self._lines("samples.jsonl")]

    def samples(self) -> dict[int, list[str]]:
        """The rows of each step."""
        return dict(self.samples_of_all())

    def until(self, check: Callable[[], Any], what: str) -> Any:
        """What ``check`` gives once that is true."""
        return quick(check, what, pause=0.1)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        offset, records = self._read.get(name, (0, []))
        lines = read_lines(Path(self.folder, name), offset)
        self._read[name] = (lines.offset, records + lines.records)
        return self._read[name][1]


def processes(title: str) -> list[int]:
    """This program's Ray processes of a kind."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(child.cmdline()).startswith(title):
                found.append(child.pid)
    return found


def quick(check: Callable[[], Any], what: str, pause: float = 0.002) -> Any:
    """What ``check`` gives once that is true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(pause)
    raise SystemExit(f"not within {WAIT_SECONDS:g} s: {what}")


def expect_success(status: dict[str, Any]) -> None:
    """Give up where a run has failed by itself."""
    if status["state"] != "SUCCEEDED":
        raise SystemExit(f"{status['run_id']} {status['state']}: {status['error']}")


def say(text: str) -> None:
    """Tell what goes on."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
