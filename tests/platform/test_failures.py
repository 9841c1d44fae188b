"""Real gangs that fail in every way: who is blamed, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mini_jobs import mini_client, mini_cluster, mini_job, wait_until
from small_disk import fill, small_disk

from ringworld_jobs.eval_spec import EvalSpec
from ringworld_jobs.resolve import resolved_yaml
from ringworld_model.hf_layout import parameter_shapes
from ringworld_platform.client import Client
from ringworld_platform.evaluation_records import read_answers, read_figures
from ringworld_workers.store.opening import open_store

WAIT_SECONDS = 200.0
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

STALL_SECONDS = 4
"""Longer than a busy machine keeps a rank that is sound from its next step."""

STALLS = {
    "freeze": "does not answer: its process is stopped by a signal (SIGSTOP)",
    "hold": "does not answer: its process is alive and does not let Python run",
    "loop": "does not come: it is in forward of step 3, at _wait_for_nothing (mini_stage.py:",
    "skip_collective": "has ended its stage, and others wait for it",
}
OTHERS = {
    "raise": "RuntimeError: injected at step 3",
    "late": "rank 1: RuntimeError: injected late at step 3",
}


# What the run does about, by what it knows of itself.
JUDGED = ("nan", "store", "memory")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[Client]:
    with mini_cluster(num_cpus=12), mini_client(root) as made:
        yield made


@pytest.fixture(scope="module")
def ended(client: Client, root: Path, write_checkpoint: Any) -> dict[str, dict[str, Any]]:
    """A job for each fault, all at once, each on two ranks; rank 1 has the fault in step 3."""
    slow = slow_run(client, root / "slow")
    killed = evaluation(client, root / "killed", write_checkpoint)
    runs = {kind: submitted(client, root / kind, kind) for kind in (*STALLS, *OTHERS, *JUDGED)}
    return {
        kind: {**client.wait(run, timeout_seconds=WAIT_SECONDS), "events": client.events(run)}
        for kind, run in {**runs, "slow": slow, "killed": killed}.items()
    }


def slow_run(client: Client, store: Path) -> str:
    """A job whose rank 1 takes longer in steps 15 to 30."""
    store.mkdir()
    (store / "fault.json").write_text(json.dumps({"rank": 1, "slow": [15, 30, 0.4]}))
    return client.submit(
        mini_job(store, name="slow", stages=(("1k", 2, 50),), step_seconds=0.1, max_restarts=0)
    )


def evaluation(client: Client, store: Path, write_checkpoint: Any) -> str:
    """A job of evaluations on two rings, one of which is killed at an item; its limit is missed."""
    (store / "mini-1").mkdir(parents=True)
    (store / "deadly.json").write_text(json.dumps({"rank": 1, "item": 7}))
    trained = mini_job(store)
    (store / "mini-1" / "spec.yaml").write_text(resolved_yaml(trained))
    shapes = parameter_shapes(trained.model.config())
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    write_checkpoint(open_store(f"file://{store}/mini-1/checkpoints"), weights, stage="1k", ranks=1)
    return client.submit(
        EvalSpec.model_validate(
            {
                "kind": "eval",
                "name": "killed",
                "model": f"{store}/mini-1",
                "evaluate": {"needle": {"min_accuracy": 0.9}},
                "mesh": {"sequence_parallel": 1, "data_parallel": 2},
                "data": {"sources": {"books": {"shards": str(store / "books")}}},
                "resources": {"accelerator": "cpu", "workers": {"max": 2}},
                "checkpoint": {"store": f"file://{store}"},
                "tracking": {"mlflow": "off"},
            }
        )
    )


def submitted(client: Client, store: Path, kind: str) -> str:
    store.mkdir()
    comes_back = kind in ("raise", "memory")
    fault = {"kind": kind, "rank": 1, "step": 3, "attempts": 2 if kind == "store" else 9}
    (store / "fault.json").write_text(json.dumps(fault))
    name = kind.replace("_", "-")
    limit = f"{STALL_SECONDS}s" if kind in STALLS else "10min"
    spec = mini_job(
        store, name=name, stages=(("1k", 2, 6),), max_restarts=5 * comes_back, stall_timeout=limit
    )
    return client.submit(spec)


def evidence_of(status: dict[str, Any]) -> Path:
    failure = next(event for event in status["events"] if event["kind"] == "failure")
    assert failure["rank"] == 1
    return Path(status["run_folder"]) / str(failure["evidence"])


def test_an_evaluation_goes_on_after_a_kill_and_its_limit_ends_the_job(
    ended: dict[str, dict[str, Any]],
) -> None:
    status = ended["killed"]
    folder = Path(status["run_folder"])

    assert status["attempt"] == 2, status["error"]
    texts = [event["text"] for event in status["events"]]
    assert any("rank 1 (pid" in text for text in texts)
    first, again = (text for text in texts if text.startswith("asks needle of mini-1/1k/8: 12"))
    assert "answered already" in again and "answered already" not in first
    answers = read_answers(folder, 0, "killed")
    assert sorted(answer["number"] for answer in answers) == list(range(12))
    by_attempt = {a: {x["number"] for x in answers if x["attempt"] == a} for a in (1, 2)}
    assert {1, 3, 5} <= by_attempt[1] and {7, 9, 11} <= by_attempt[2]
    assert len(answers) == len((folder / "evaluations/00-killed.jsonl").read_text().split("\n")) - 2
    # 0 + 1 + 4 + ... + 121 = 506
    (figures,) = read_figures(folder)
    assert figures["accuracy"] == 0.506 and figures["items"] == 12
    assert status["state"] == "FAILED"
    assert (
        "evaluate.needle.min_accuracy of killed: accuracy must be at least 0.9" in status["error"]
    )
    assert "`ringworld resume killed-1`" in status["error"]


@pytest.mark.parametrize("kind", [*STALLS, *OTHERS])
def test_the_odd_rank_is_named_and_all_that_is_known_is_kept(
    ended: dict[str, dict[str, Any]], kind: str
) -> None:
    status = ended[kind]

    assert status["state"] == "FAILED"
    assert {**STALLS, **OTHERS}[kind] in status["error"]
    folder = evidence_of(status)
    assert folder.parent.name == "evidence"
    told = json.loads((folder / "failure.json").read_text())
    assert (told["rank"], told["attempt"], told["stage"]) == (1, 1, "1k")
    assert told["text"] in status["error"]
    assert [facts["rank"] for facts in told["ranks"]] == [0, 1]
    assert told["ranks"][0]["answered"]
    assert told["nodes"][0]["alive"]
    stacks = (folder / "stacks.txt").read_text()
    assert "===== rank 0 (pid" in stacks and "===== rank 1 (pid" in stacks
    records = (folder / "records.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] >= 2


def test_an_exception_that_comes_back_uses_up_one_restart(ended: dict[str, dict[str, Any]]) -> None:
    status = ended["raise"]

    assert status["attempt"] == 2
    assert "given up, for it is the same exception in the same step (3)" in status["error"]


def test_stalls_say_how_long_and_where_the_others_wait(ended: dict[str, dict[str, Any]]) -> None:
    for kind in STALLS:
        error = ended[kind]["error"]
        limit = f"no progress for {STALL_SECONDS} s (recovery.stall_timeout)"
        assert error.startswith(f"{limit}: rank 1 (pid ")
        assert "rank 0 is in forward of step" in error
        assert "waiting in all_reduce" in error


def test_stacks_show_where_each_rank_is(ended: dict[str, dict[str, Any]]) -> None:
    for kind in STALLS:
        stacks = (evidence_of(ended[kind]) / "stacks.txt").read_text()
        first, second = stacks.split("===== rank ")[1:]
        assert "all_reduce" in first and "mini_stage.py" in first
        if kind == "loop":
            assert "_wait_for_nothing" in second
        if kind == "freeze":
            assert "it did not answer: its process is stopped by a signal" in second
        if kind == "hold":
            assert "in _maybe_fail" in second, "written by C code, since Python could not run"
    raised = (evidence_of(ended["raise"]) / "stacks.txt").read_text()
    assert "RuntimeError: injected at step 3" in raised.split("===== rank ")[2]
    log = (evidence_of(ended["raise"]) / "log.txt").read_text()
    assert "Traceback" in log, "the last lines of the odd rank"


def test_a_slow_rank_is_told_once_and_fails_nothing(ended: dict[str, dict[str, Any]]) -> None:
    status = ended["slow"]

    assert (status["state"], status["attempt"]) == ("SUCCEEDED", 1), status
    begins, over = [event for event in status["events"] if event["kind"] == "slow"]
    assert (begins["rank"], over["rank"]) == (1, 1)
    assert "rank 1 (pid " in begins["text"] and "is slow: its compute takes " in begins["text"]
    assert begins["ratio"] > 2
    assert over["text"].endswith("is no longer slow")
    metrics = (Path(status["run_folder"]) / "metrics.jsonl").read_text()
    assert "ring_compute_by_rank" not in metrics


def events(status: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in status["events"] if event["kind"] == kind]


def test_rows_that_diverge_are_left_out_by_the_next_gang(ended: dict[str, dict[str, Any]]) -> None:
    status = ended["nan"]
    assert (status["state"], status["attempt"]) == ("SUCCEEDED", 2), "and max_restarts is 0"
    (told,) = events(status, "rollback")
    assert told["text"] == (
        "goes back to the initial weights and leaves out step 3 (rows 2 to 2) of stage 1k"
    )
    assert events(status, "failure")[0]["failure"] == "diverged"
    assert status["left_out"] == {"0": [3]}


def test_a_store_that_is_away_costs_no_restart(ended: dict[str, dict[str, Any]]) -> None:
    status = ended["store"]
    assert (status["state"], status["attempt"]) == ("SUCCEEDED", 3), "and max_restarts is 0"
    waits = [event["text"] for event in events(status, "state") if "waits for" in event["text"]]
    assert [text[-12:] for text in waits] == ["again in 1 s", "again in 2 s"]


def test_too_little_memory_is_tried_once_more(ended: dict[str, dict[str, Any]]) -> None:
    status = ended["memory"]
    assert (status["state"], status["attempt"]) == ("FAILED", 2)
    assert "MemoryError: CUDA out of memory" in status["error"]
    assert "stage 1k trains 1,024 tokens of context on 2 workers" in status["error"]
    assert "the cheapest remedies are memory.activation_checkpointing: full" in status["error"]


def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(
    client: Client, tmp_path: Path
) -> None:
    with small_disk(tmp_path) as disk:
        spec = mini_job(disk / "runs", name="full", stages=(("1k", 1, 60),), step_seconds=0.1)
        run = client.submit(spec)
        wait_until(lambda: client.status(run)["step"] >= 6, "the first checkpoint")
        filler = fill(disk)
        status = client.wait(run, timeout_seconds=WAIT_SECONDS)
        assert status["state"] == "FAILED"
        assert "free space" in status["error"], "of the logs or of the checkpoints"
        filler.unlink()
        client.resume(run)
        again = client.wait(run, timeout_seconds=WAIT_SECONDS)
        assert (again["state"], again["step"]) == ("SUCCEEDED", 60)
        starts = [r for r in client.metrics(run).items if r["kind"] == "stage_start"]
        assert starts[-1]["step"] >= 5, "from what was committed"
