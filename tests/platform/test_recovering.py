"""What a run does about failures that depend on what it is and has done."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mini_jobs
import pytest
import torch

from ringworld_platform.drain import DrainWatch, Warnings
from ringworld_platform.evidence import keep
from ringworld_platform.first_cause import lost_worker, raised
from ringworld_platform.live_run import LiveRun
from ringworld_platform.memory_advice import host_levers, levers
from ringworld_platform.recovering import Recovering
from ringworld_platform.recovery import Failure, FailureKind
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord
from ringworld_platform.run_states import RunStates
from ringworld_workers.actor import Identity, WorkerFailure
from ringworld_workers.checkpoint.layout import CheckpointError
from ringworld_workers.guard import TrainingDiverged
from ringworld_workers.store.base import StoreError

MakeLive = Callable[..., LiveRun]


@pytest.fixture
def make_live(tmp_path: Path) -> MakeLive:
    """A run in the second of its stages, which has 2 rows a step."""

    def make(**recovery: Any) -> LiveRun:
        spec = mini_jobs.mini_job(tmp_path, **recovery)
        stages = [stage.model_copy(update={"global_batch_tokens": 2048}) for stage in spec.stages]
        spec = spec.model_copy(update={"stages": stages})
        folder = RunFolder(tmp_path / "mini-1")
        folder.open("kind: train\n")
        place = {"run_folder": str(folder.path), "spec_digest": "d"}
        record = JobRecord(
            job="mini", run_id="mini-1", num_stages=2, stages_done=1, stage_index=1, stage="4k",
            ring_size=2, data_parallel_size=1, **place,
        )  # fmt: skip
        return LiveRun(record, spec, RunStates(tmp_path), folder)

    return make


def diverged(step: int, action: str = "rollback", skip: tuple[int, ...] | None = None) -> Failure:
    facts = {"kind": "nan", "action": action, "step": step, "skip_steps": list(skip or (step,))}
    try:
        raise TrainingDiverged(f"loss_text is nan at step {step}", facts)
    except TrainingDiverged as error:
        return raised(1, WorkerFailure.of(error)).failure


def test_rows_that_diverged_are_left_out_for_good(make_live: MakeLive) -> None:
    live = make_live(max_rollbacks=2)
    live.set_fields(checkpoint="01-4k/step-00000004", restarts=3)
    judge = Recovering(live)
    plan = judge.plan(diverged(6))
    assert plan.decision.restart and plan.decision.free and plan.decision.delay_seconds == 0
    assert plan.fields == {
        "left_out": {1: [6]},
        "rollbacks": 1,
        "restarts": 3,
        "attempt": 0,
        "error": "rank 1: TrainingDiverged: loss_text is nan at step 6",
    }
    (event,) = live.folder.events()
    assert (event["kind"], event["steps"]) == ("rollback", [6])
    assert event["text"] == (
        "goes back to 01-4k/step-00000004 and leaves out step 6 (rows 10 to 11) of stage 4k"
    )
    # It is in the state, whoever goes on with the run.
    live.set_fields(**plan.fields)
    again = JobRecord.model_validate_json(live.record.model_dump_json())
    assert again.left_out == {1: [6]}

    later = judge.plan(diverged(9, skip=(8, 9)))
    assert later.fields["left_out"] == {1: [6, 8, 9]}
    live.set_fields(**later.fields)
    spent = judge.plan(diverged(20)).decision
    assert not spent.restart and "after 2 rollbacks" in spent.text
    assert "recovery.max_rollbacks=2" in spent.text


def test_rows_are_not_to_blame_for_a_step_after_those_left_out(make_live: MakeLive) -> None:
    live = make_live()
    live.set_fields(left_out={1: [6]}, rollbacks=1)
    decision = Recovering(live).plan(diverged(7)).decision
    assert not decision.restart
    assert "the rows of step 6 were left out already and it diverges all the same" in decision.text
    assert live.folder.events() == []


def test_a_job_that_wants_to_stop_stops(make_live: MakeLive) -> None:
    decision = Recovering(make_live()).plan(diverged(3, action="stop")).decision
    assert not decision.restart
    assert decision.text == "rank 1: TrainingDiverged: loss_text is nan at step 3"


def failed(error: Exception) -> Failure:
    try:
        raise error
    except Exception as caught:
        return raised(0, WorkerFailure.of(caught)).failure


def test_a_store_that_is_away_is_waited_for(make_live: MakeLive) -> None:
    live = make_live(store_timeout="60s", max_restarts=0)
    clock = iter((0.0, 1.0, 3.0, 59.0, 61.0, 62.0))
    judge = Recovering(live, clock=lambda: next(clock))
    away = failed(StoreError("get", "s3://b/writer.json", "nothing answers", transient=True))
    assert away.kind is FailureKind.STORE
    delays = []
    for _ in range(4):
        plan = judge.plan(away)
        assert plan.decision.free and plan.fields["restarts"] == 0
        delays.append(plan.decision.delay_seconds)
    assert delays == [1, 2, 4, 8]
    late = judge.plan(away).decision
    assert not late.restart and "recovery.store_timeout is 60 s" in late.text
    # Another outage, after steps that went well, has a time of its own.
    live.set_fields(global_step=9)
    assert judge.plan(away).decision.delay_seconds == 1
    for certain in (StoreError("get", "x", "access denied"), CheckpointError("x is damaged")):
        assert failed(certain).kind is not FailureKind.STORE


def test_whatever_fails_a_run_without_a_new_checkpoint_comes_to_an_end(make_live: MakeLive) -> None:
    """Each way to go on is counted or timed, but for workers that were taken away."""
    draw = random.Random(6)
    counted = (FailureKind.WORKER_LOST, FailureKind.STALL, FailureKind.ERROR, FailureKind.STORE)
    ends = set()
    for _ in range(40):
        most, rollbacks = draw.randint(0, 4), draw.randint(0, 3)
        live = make_live(max_restarts=most, max_rollbacks=rollbacks, store_timeout="60s")
        now = [0.0]
        judge = Recovering(live, clock=lambda now=now: now[0])  # type: ignore[misc]
        for number in range(most + rollbacks + 62):
            now[0] += draw.uniform(1.0, 30.0)
            kind = draw.choice((*counted, FailureKind.DIVERGED))
            fell = Failure(kind, "it fell")
            if kind is FailureKind.DIVERGED:
                fell = diverged(draw.randint(1, 99))
            elif number and draw.random() < 0.1:
                fell = Failure(FailureKind.OUT_OF_MEMORY, "no memory")
            plan = judge.plan(fell)
            if not plan.decision.restart:
                ends.add(fell.kind)
                break
            live.set_fields(**plan.fields)
        else:
            pytest.fail(f"{number + 1} restarts and no end: {live.status()}")
    assert ends >= {FailureKind.DIVERGED, FailureKind.STORE, FailureKind.ERROR}


def test_memory_that_was_not_enough_is_tried_once_more(make_live: MakeLive) -> None:
    live = make_live(max_restarts=3)
    # Others' failures before it use up nothing of its own second try.
    live.set_fields(restarts=2)
    live.folder.append_metrics(
        [
            {"kind": "step", "stage": "4k", "step": 7, "memory_host_bytes": 3 << 30},
            {"kind": "checkpoint", "stage": "4k", "step": 7},
        ]
    )
    message = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB"
    failure = failed(torch.OutOfMemoryError(message))
    assert failure.kind is FailureKind.OUT_OF_MEMORY
    judge = Recovering(live)
    first = judge.plan(failure)
    assert first.decision.restart and first.fields["restarts"] == 3
    live.set_fields(restarts=0)
    again = judge.plan(failure).decision
    assert not again.restart
    assert again.text == (
        f"rank 0: OutOfMemoryError: {message}; stage 4k trains 1,024 tokens of context on 2 "
        "workers, where rank 0 used 3.0 GiB of host memory at step 7; the cheapest remedies are "
        "memory.activation_checkpointing: full, then memory.mlp_tile_tokens: 4096, then loss."
        "tile_tokens: 1024; given up, for a gang before it had not enough either"
    )
    assert levers(live.spec.stages[1], live.record)[0] == "memory.activation_checkpointing: full"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_errors_without_a_class_of_their_own(error: Exception) -> None:
    assert failed(error).kind is FailureKind.OUT_OF_MEMORY


def test_a_warning_explains_only_what_the_loss_of_a_worker_brings() -> None:
    warnings = Warnings(DrainWatch(lambda: {"n1": None}))
    assert warnings.look([Identity("n1", "10.0.0.1", 7, ())]) is not None
    lost = Failure(FailureKind.WORKER_LOST, "rank 0 was lost", 0)
    now = time.monotonic()
    explained = warnings.explain(lost, now)
    assert explained.kind is FailureKind.TAKEN_AWAY
    assert explained.text == "node 10.0.0.1 is being drained; rank 0 was lost"
    short = Failure(FailureKind.OUT_OF_MEMORY, "rank 0: MemoryError", 0)
    for own in (diverged(6), short, Failure(FailureKind.USER_ERROR, "rank 0: ValueError", 0)):
        assert warnings.explain(own, now) is own, "it would come back on other nodes"
    # Whoever is killed a moment after SIGTERM was not warned, however long his gang takes to end.
    warnings.forget()
    heard = warnings.signalled("rank 0 got SIGTERM").heard
    assert warnings.explain(lost, heard + 0.5) is lost
    assert warnings.explain(lost, heard + 2.0).kind is FailureKind.TAKEN_AWAY


def test_rays_memory_monitor_is_believed() -> None:
    said = RuntimeError("Task was killed due to the node running low on memory.")
    failure = lost_worker(1, "pid 7 on 10.0.0.1", said).failure
    assert failure.kind is FailureKind.OUT_OF_MEMORY
    assert "rank 1 (pid 7 on 10.0.0.1) was lost: Ray killed it because its node" in failure.text


def test_a_node_that_is_short_of_memory_needs_other_levers_than_its_gpus(
    make_live: MakeLive,
) -> None:
    live = make_live(max_restarts=3)
    said = RuntimeError("Task was killed due to the node running low on memory.")
    failure = lost_worker(1, "pid 7 on 10.0.0.1", said).failure
    step = {"kind": "step", "stage": "4k", "step": 7, "memory_host_bytes": 3 << 30}
    live.metrics([step])
    text = Recovering(live).plan(failure).decision.text
    assert "remedies are memory.activation_checkpointing: full, then" in text, "CPUs compute"
    live.metrics([{**step, "memory_device_bytes": 1 << 30}])
    text = Recovering(live).plan(failure).decision.text
    assert "used 1.0 GiB of device memory and 3.0 GiB of host memory at step 7" in text
    assert (
        "remedies are checkpoint.max_host_bytes: 4Gi, then nodes with more memory, or fewer "
        "workers on each" in text
    )
    stage = live.spec.stages[1]
    memory = stage.memory.model_copy(update={"activation_offload": True, "optimizer_offload": True})
    stage = stage.model_copy(update={"memory": memory})
    assert host_levers(stage, live.spec.checkpoint) == [
        "checkpoint.max_host_bytes: 4Gi",
        "memory.activation_checkpointing: full",
        "memory.activation_offload: false",
    ]


def test_what_a_rank_found_is_kept_inside_the_runs_folder(tmp_path: Path) -> None:
    place = keep(tmp_path, "../attempt-1-step-00000006-nan", {"value": "nan"})
    assert place == "evidence/attempt-1-step-00000006-nan.json"
    assert json.loads((tmp_path / place).read_text()) == {"value": "nan"}
    (tmp_path / "file").touch()
    assert keep(tmp_path / "file", "x", {}) is None
