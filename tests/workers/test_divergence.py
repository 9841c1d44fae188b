"""Numbers that are not finite, and losses that jump: found, explained, and left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_jobs import MODEL, ROWS_PER_STEP, Collector, stage_job, text_document, write_source

from ringworld_jobs.spec import RecoverySpec
from ringworld_model.batch import TEXT
from ringworld_workers import train_loop
from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.data.loader import StageLoader
from ringworld_workers.guard import NumericGuard, TrainingDiverged
from ringworld_workers.mesh import build_mesh
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store
from ringworld_workers.train_loop import run_stage

POISON = MODEL.text_vocab_size - 1
"""A token that no sound document has."""
Gang = Callable[..., list[Any]]


def guard(**spike: Any) -> NumericGuard:
    return NumericGuard(RecoverySpec.model_validate({"loss_spike": {"window": 8, **spike}}))


def judge(judged: NumericGuard, values: list[float], name: str = "loss_text") -> list[Any]:
    first = judged.history[-1]["step"] + 1 if judged.history else 1
    return [judged.judge(int(first) + at, {name: value}) for at, value in enumerate(values)]


def test_a_jump_is_told_once_and_when_it_is_over() -> None:
    watched = guard()
    calm = [2.0, 2.01, 1.99, 2.0, 2.02, 1.98, 2.0, 2.01]
    assert judge(watched, calm) == [None] * 8
    found, again = judge(watched, [2.6, 2.7])
    assert again is None and not watched.over()
    assert (found.kind, found.name, found.action, found.value) == (
        "spike",
        "loss_text",
        "warn",
        2.6,
    )
    assert found.usual == 2.0 and found.limit == pytest.approx(2.24), "2 % of 2.0, six times"
    assert str(found) == "loss_text jumped to 2.6, from 2 lately (limit 2.24)"
    assert judge(watched, [2.0]) == [None]
    assert watched.over() == {"loss_text"} and not watched.over()
    assert judge(watched, [1.0, 0.5]) == [None, None], "down is no harm"


def test_what_is_not_known_yet_is_not_judged() -> None:
    assert judge(guard(), [2.0, 9.0])[1] is None, "a quarter of the window comes first"
    assert judge(guard(), [2.0, 2.0, 9.0])[2] is not None
    assert judge(guard(action="off"), [2.0, 2.0, 9.0])[2] is None
    # A gradient norm is noisy, and a mixed loss jumps with the mixture.
    assert judge(guard(), [1.0, 1.0, 1.0, 2.4], "grad_norm")[3] is None
    assert judge(guard(), [1.0, 1.0, 1.0, 2.6], "grad_norm")[3] is not None
    assert judge(guard(), [2.0, 2.0, 9.0], "loss")[2] is None
    (broken,) = judge(guard(action="off"), [float("nan")])
    assert (broken.kind, broken.action) == ("nan", "rollback"), "from the first step on"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_score_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(TrainingDiverged, match="loss_text is -?(inf|nan) at step 9") as caught:
        train_loop.refuse_nonsense({"loss_text": value}, "a", 9, RecoverySpec(on_nan="stop"))
    assert caught.value.facts["action"] == "stop"


# The real loop.


def poisoned_source(
    folder: Path, documents: list[Any], poison: Callable[[Any], Any], step: int, steps: int
) -> tuple[str, str]:
    """Documents, one of which is poisoned; training sees it in that step (from 1) alone.

    Returns:
        The dataset's folder, and the start of the id of the poisoned example.
    """
    source = write_source(folder / "sound", documents, longer="refuse")
    job = stage_job({"documents": source}, "file:///nowhere", **stage(steps))
    loader = StageLoader(job.sources, job.stage, job.spec.seed)
    seen = [{int(sample.split("/")[2]) for sample in loader.sample_ids(at)} for at in range(steps)]
    elsewhere = set().union(*(ids for at, ids in enumerate(seen) if at != step - 1))
    chosen = min(seen[step - 1] - elsewhere)
    # The first five are held out.
    documents = list(documents)
    documents[chosen + 5] = poison(documents[chosen + 5])
    return write_source(folder / "poisoned", documents, longer="refuse"), f"/0/{chosen}/"


def stage(steps: int, **changes: Any) -> dict[str, Any]:
    return {
        "mixture": {"documents": 1},
        "steps": steps,
        "validation_rows": 0,
        "learning_rate": {"peak": 3e-3},
        **changes,
    }


def train(rank: int, world_size: int, job: StageJob, fault: str) -> dict[str, Any]:
    """The real loop, with a fault.

    ``poison``: where that token is, the model's first table gives NaN. ``flip``: the first step
    leaves a weight of rank 1 at infinity, as a flipped bit would.
    """
    mesh = build_mesh(job.sequence_parallel_size, job.data_parallel_size)
    build = train_loop.build_engine

    def build_poisoned(*arguments: Any) -> Any:
        engine = build(*arguments)

        def taste(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.masked_fill((inputs[0] == POISON)[..., None], float("nan"))

        def step_and_flip() -> float:
            norm = float(step())
            engine.owned_ranges()[0].data[0] = float("inf")
            return norm

        step = engine.step
        if fault == "flip" and rank == 1:
            engine.step = step_and_flip
        if fault == "poison":
            engine.module.text_embed.register_forward_hook(taste)
        return engine

    train_loop.build_engine = build_poisoned
    reporter = Collector()
    try:
        result = run_stage(job, mesh, reporter)
    except TrainingDiverged as error:
        result = {"error": str(error), "facts": error.facts}
    return {"result": result, "records": reporter.records}


def kinds(outcome: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [record for record in outcome["records"] if record["kind"] == kind]


def objects(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.bin"))]


def test_rows_with_nan_are_found_and_left_out(run_gang: Gang, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    sound = [
        (np.minimum(ids, POISON - 1), modality)
        for ids, modality in (text_document(generator, n) for n in [40] * 60)
    ]
    source, sample = poisoned_source(
        tmp_path, sound, lambda d: (np.full_like(d[0], POISON), d[1]), step=4, steps=5
    )

    def job(store: str, **changes: Any) -> StageJob:
        url = f"file://{tmp_path}/{store}"
        # Sharded, computed again and cut into tiles: nothing of that hides who was first.
        hard = {
            "zero_stage": 3,
            "precision": "bf16",
            "memory": {"activation_checkpointing": "full", "mlp_tile_tokens": 32},
        }
        return stage_job({"documents": source}, url, data_parallel=2, **stage(5, **hard, **changes))

    first, second = run_gang(train, 2, job("run"), "poison")
    assert first["result"] == second["result"]
    facts = first["result"]["facts"]
    assert facts == {"kind": "nan", "action": "rollback", "step": 4, "skip_steps": [4]}
    assert [ref.step for ref in committed(open_store(f"file://{tmp_path}/run"))] == [2]
    (told,) = kinds(first, "evidence")
    assert kinds(second, "evidence") == []
    data = told["data"]
    json.dumps(data, allow_nan=False)
    (row,) = (row for row in data["samples"] if any(sample in each for each in row["samples"]))
    odd = (row["row"] - data["rows"][0]) // (ROWS_PER_STEP // 2)
    assert data["odd_rank"] == odd
    assert first["result"]["error"] == data["text"] == told["text"]
    rows = data["ranks"][odd]["rows"]
    assert rows[0] <= row["row"] < rows[1]
    assert (
        f"loss_text is nan at step 4 of stage first: rank {odd} (rows {rows[0]} to" in told["text"]
    )
    assert "had it first, out of text_embed in micro-batch" in told["text"]
    assert "left out from the newest checkpoint" in told["text"]
    assert data["ranks"][1 - odd]["first"] is None, "its rows are sound"
    assert data["ranks"][odd]["num_broken_gradients"] > 5
    other = data["ranks"][1 - odd]
    assert other["broken_gradients"] == [] == other["broken_state"]
    assert all(norm > 0 for name, norm in other["gradient_norms"].items() if "layers" in name)
    assert [step["step"] for step in data["history"]] == [1, 2, 3, 4]
    assert data["history"][3]["loss_text"] == data["value"] == "nan"

    # The next gang leaves the rows out, and so does one that goes on later.
    gone_on, _ = run_gang(train, 2, job("run", attempt=2, skip_steps=(4,)), "poison")
    assert gone_on["result"]["status"] == "finished"
    (start,) = kinds(gone_on, "stage_start")
    assert start["resumed_from"] == "00-first/step-00000002"
    (left_out,) = kinds(gone_on, "left_out")
    assert (left_out["step"], left_out["rows"]) == (4, data["rows"])
    assert any(sample in each for each in left_out["left_out_ids"])
    (event,) = kinds(gone_on, "rows_left_out")
    assert event["text"].startswith("step 4 of stage first is left out, with rows 12 to 15")
    assert [step["step"] for step in kinds(gone_on, "step")] == [3, 5]

    undisturbed, _ = run_gang(train, 2, job("whole", skip_steps=(4,)), "")
    for one, two in zip(kinds(gone_on, "step"), kinds(undisturbed, "step")[2:], strict=True):
        for name in ("step", "loss_text", "grad_norm", "sample_ids", "learning_rate", "tokens"):
            assert one[name] == two[name], name
    last = "00-first/step-00000005"
    assert objects(tmp_path / "run" / last) == objects(tmp_path / "whole" / last) != []


def test_rows_that_make_the_loss_jump_are_told_or_left_out(run_gang: Gang, tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    steps, at = 40, 35
    # What a model of two layers learns in 30 steps: to say the same again.
    dull = [
        (np.full(90, generator.integers(0, 8), np.int32), np.full(90, TEXT, np.uint8))
        for _ in range(4 * steps + 5)
    ]
    source, sample = poisoned_source(
        tmp_path, dull, lambda _: text_document(generator, 90), step=at, steps=steps
    )

    def job(action: str) -> StageJob:
        spike = {"window": 12, "action": action, "skip_steps": 2}
        return stage_job(
            {"documents": source},
            f"file://{tmp_path}/{action}",
            recovery={"loss_spike": spike},
            **stage(steps, learning_rate={"peak": 1e-2, "warmup_steps": 12}),
        )

    (warned,) = run_gang(train, 1, job("warn"), "")
    assert warned["result"]["status"] == "finished"
    begin = next(event for event in kinds(warned, "loss_spike") if event["step"] == at)
    assert begin["text"].startswith("loss_text jumped to ")
    assert begin["rows"] == [ROWS_PER_STEP * (at - 1), ROWS_PER_STEP * at]
    assert any("is down to" in event["text"] for event in kinds(warned, "loss_spike"))

    (ended,) = run_gang(train, 1, job("rollback"), "")
    facts = ended["result"]["facts"]
    assert facts == {"kind": "spike", "action": "rollback", "step": at, "skip_steps": [at - 1, at]}
    (told,) = kinds(ended, "evidence")
    assert told["data"]["value"] == begin["value"] > told["data"]["limit"]
    assert "rank 0 (rows 136 to 139) has the largest" in told["text"]
    assert any(sample in each for row in told["data"]["samples"] for each in row["samples"])
    assert told["data"]["ranks"][0]["gradient_norms"]["text_head"] > 0


@pytest.mark.parametrize("steps", [1, 3])
def test_a_state_that_is_not_finite_is_never_committed(
    run_gang: Gang, tmp_path: Path, steps: int
) -> None:
    """Whether the stage ends with it, or a later step shows it: the shard's owner tells it on."""
    source = write_source(
        tmp_path / "s", [text_document(np.random.default_rng(5), 40) for _ in range(30)], "refuse"
    )
    url = f"file://{tmp_path}/run"
    job = stage_job({"documents": source}, url, data_parallel=2, every="9 steps", **stage(steps))
    results = [outcome["result"] for outcome in run_gang(train, 2, job, "flip")]
    assert results[0] == results[1]
    if steps == 1:
        assert results[0]["facts"]["skip_steps"] == [1]
        said = "the state after step 1 of stage first is no longer sound: checkpoint 00-first/step-"
        assert results[0]["error"].startswith(said)
        assert "rank 1: " in results[0]["error"] and "holds NaN or Inf" in results[0]["error"]
    else:
        assert results[0]["facts"] | {"skip_steps": [2]} == results[0]["facts"]
        assert "loss_text is nan at step 3 of stage first: rank 1 holds" in results[0]["error"]
        assert "tensors with NaN or Inf since the step before" in results[0]["error"]
    assert committed(open_store(url)) == []
