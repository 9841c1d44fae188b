"""A recorded run folder: three stages, a worker lost in the second, validation after each."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ringworld_jobs.spec import JobSpec

STAGES = [("4k", 4096, 1e6, 1), ("8k", 8192, 5e6, 2), ("16k", 16384, 1e7, 2)]
STEPS = 20
REDONE_FROM, LOST_AT = 10, 13
"""In the second stage a worker is lost after step 13; the job goes back to step 10."""


def recorded_spec(name: str = "quickstart", mlflow: str = "auto") -> JobSpec:
    return JobSpec.model_validate(
        {
            "kind": "train",
            "name": name,
            "data": {"sources": {"books": {"shards": "books"}, "clips": {"shards": "clips"}}},
            "tracking": {"mlflow": mlflow},
            "resources": {"workers": {"min": 1, "max": 2}},
            "stages": [
                {
                    "name": stage,
                    "context_length": context,
                    "rope_theta": theta,
                    "steps": STEPS,
                    "global_batch_tokens": 16384,
                    "mesh": {"sequence_parallel": ring, "data_parallel": 1},
                    "mixture": {"books": 0.5, "clips": 0.5},
                    "learning_rate": {"peak": 1e-3, "schedule": "cosine", "warmup_steps": 4},
                }
                for stage, context, theta, ring in STAGES
            ],
        }
    )


def _step_record(stage_index: int, step: int, attempt: int, clock: float) -> dict[str, Any]:
    stage, _, _, ring = STAGES[stage_index]
    done = stage_index * STEPS + step
    noise = random.Random(done * 10 + attempt).uniform(-0.06, 0.06)
    seconds = 0.9 + 0.2 * stage_index + noise
    text = 2.6 + 4.4 * math.exp(-done / 14) + noise
    vision = 3.4 + 2.9 * math.exp(-done / 20) - noise
    return {
        "kind": "step",
        "stage": stage,
        "stage_index": stage_index,
        "step": step,
        "global_step": done,
        "attempt": attempt,
        "time": clock,
        "loss": (text + vision) / 2,
        "loss_text": text,
        "loss_vision": vision,
        "grad_norm": 0.4 + 3 * math.exp(-done / 8) + abs(noise),
        "learning_rate": 1e-3 * min(1.0, step / 4) * 0.5 * (1 + math.cos(math.pi * step / STEPS)),
        "tokens": done * 16384,
        "tokens_per_second": 16384 / seconds,
        "step_seconds": seconds,
        "data_seconds": 0.03,
        "forward_seconds": seconds * 0.3,
        "backward_seconds": seconds * 0.55,
        "ring_compute_seconds": 0.3 * seconds,
        "ring_compute_max_seconds": 0.33 * seconds,
        "ring_wait_seconds": 0.05 * (ring - 1),
        "ring_wait_max_seconds": 0.08 * (ring - 1),
        "ring_bytes_sent": 8e6 * (ring - 1),
        "ring_bytes_sent_max": 9e6 * (ring - 1),
        "ring_slowest_rank": ring - 1,
        "optimizer_seconds": seconds * 0.08,
        "checkpoint_stall_seconds": 0.12 if step % 10 == 0 else 0.0,
        "memory_host_bytes": int(9e8 + 1.2e8 * stage_index),
        "memory_device_bytes": 0,
        "padding_share": 0.02,
        "plan_imbalance": 1.04,
        "rows": [0, 4],
    }


def _losses_by_position(stage_index: int) -> dict[str, float]:
    """As held-out scores have them: a bucket a doubling, up to the stage's context."""
    starts = [0, *(256 << place for place in range(4 + stage_index))]
    losses = {}
    for place, start in enumerate(starts):
        losses[f"loss_text_from_{start}"] = 3.4 - 0.2 * stage_index - 0.1 * place
        losses[f"loss_vision_from_{start}"] = 4.1 - 0.1 * stage_index - 0.05 * place
    return losses


class Recorder:
    """Writes down what the controller would have appended."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.clock = 1_790_000_000.0
        self.attempt = 1

    def add(self, kind: str, stage_index: int, step: int, **values: Any) -> None:
        self.records.append(
            {
                "kind": kind,
                "stage": STAGES[stage_index][0],
                "stage_index": stage_index,
                "step": step,
                "global_step": stage_index * STEPS + step,
                "attempt": self.attempt,
                "time": self.clock,
                **values,
            }
        )

    def start(self, stage_index: int, step: int) -> None:
        _, context, _, ring = STAGES[stage_index]
        layout = {"context_length": context, "ring_size": ring, "data_parallel_size": 1}
        self.add("stage_start", stage_index, step, num_steps=STEPS, **layout)

    def prove(self, stage_index: int) -> None:
        self.add(
            "parity",
            stage_index,
            0,
            passed=True,
            ring_size=2,
            precision="fp32",
            layout="zigzag",
            backend="cpu",
            loss_difference=0.0,
            grad_norm_difference=4e-9,
            gradient_error=3.4e-7,
            gradient_limit=1e-5,
            worst_parameter="layers.0.attention.k_proj.weight",
            check_seconds=4.2,
        )

    def stage(self, index: int) -> None:
        name = STAGES[index][0]
        if index == 1:
            self.prove(index)
        self.start(index, 0)
        step = 0
        while step < STEPS:
            step += 1
            self.clock += 1.0
            self.records.append(_step_record(index, step, self.attempt, self.clock))
            if step % 10 == 0:
                key = f"{index:02d}-{name}/step-{step:08d}"
                self.add("checkpoint", index, step, key=key, bytes=5_400_000)
            if index == 1 and self.attempt == 1 and step == LOST_AT:
                self.attempt, step = 2, REDONE_FROM
                self.clock += 8.0
                self.start(index, step)
        self.add(
            "validation",
            index,
            STEPS,
            loss_text=3.1 - 0.2 * index,
            loss_vision=3.9 - 0.1 * index,
            unigram_entropy_text=6.4,
            unigram_entropy_vision=5.1,
            **_losses_by_position(index),
            targets_text=4000,
            targets_vision=9000,
        )
        self.add("stage_end", index, STEPS, checkpoint=f"{index:02d}-{name}/step-{STEPS:08d}")


def recorded_metrics() -> list[dict[str, Any]]:
    """What the controller appended, redone steps included."""
    recorder = Recorder()
    for index in range(len(STAGES)):
        recorder.stage(index)
    return recorder.records


def recorded_events() -> list[dict[str, Any]]:
    """Three things worth a line."""
    texts = [
        ("submitted", "quickstart-1 submitted"),
        ("worker_lost", "rank 1 (pid 4242) died: killed by SIGKILL; going back to step 10 of 8k"),
        ("recovered", "attempt 2: stepping again after 7.9 s"),
    ]
    return [
        {"seq": seq, "time": 1_790_000_000.0 + 20 * seq, "kind": kind, "text": text}
        for seq, (kind, text) in enumerate(texts, start=1)
    ]


def recorded_status(folder: Path, state: str = "SUCCEEDED") -> dict[str, Any]:
    return {
        "job": "quickstart",
        "run_id": folder.name,
        "state": state,
        "reason": "",
        "stage": "16k",
        "stage_index": 2,
        "num_stages": 3,
        "step": STEPS,
        "num_steps": STEPS,
        "global_step": 3 * STEPS,
        "attempt": 2,
        "context_length": 16384,
        "ring_size": 2,
        "data_parallel_size": 1,
        "checkpoint": "02-16k/step-00000020",
        "loss": 3.05,
        "tokens_per_second": 12600.0,
        "eta_seconds": 0.0,
        "error": None,
        "run_folder": str(folder),
        "submitted": 1_790_000_000.0,
        "spec_digest": "0" * 64,
        "workers": [
            {"rank": 0, "pid": 41, "node": "n0", "device": "cpu", "phase": "forward", "step": 20},
            {"rank": 1, "pid": 42, "node": "n0", "device": "cpu", "phase": "ring", "step": 20},
        ],
    }


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def recorded_run(tmp_path: Path) -> Path:
    """Folder of a finished run, as the controller leaves it."""
    folder = tmp_path / "runs" / "quickstart-1"
    folder.mkdir(parents=True)
    spec = recorded_spec().model_dump(mode="json")
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    append_lines(folder / "metrics.jsonl", recorded_metrics())
    append_lines(folder / "events.jsonl", recorded_events())
    (folder / "state.json").write_text(json.dumps(recorded_status(folder)), encoding="utf-8")
    return folder


@pytest.fixture
def recording() -> dict[str, Callable[..., Any]]:
    """The parts of the recorded run, for tests that write their own."""
    return {
        "spec": recorded_spec,
        "metrics": recorded_metrics,
        "events": recorded_events,
        "status": recorded_status,
        "append": append_lines,
    }


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sqlite store with MLflow's schema; making one takes seconds, so it is made once."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path.read_bytes()
