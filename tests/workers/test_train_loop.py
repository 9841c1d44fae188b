"""A stage through the real loop, engine and store: any mesh, any interruption, the same run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_jobs import (
    CONTEXT_LENGTH,
    MODEL,
    NUM_STEPS,
    ROWS_PER_STEP,
    Collector,
    make_sources,
    stage_job,
)

from ringworld_jobs.spec import JobSpec
from ringworld_model.hf import from_pretrained, save_pretrained
from ringworld_model.hf_sink import FolderSink
from ringworld_model.ring import RingContext, plan_rows
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_workers import train_loop
from ringworld_workers.checkpoint.layout import CheckpointError, Manifest
from ringworld_workers.checkpoint.reader import RangeReader, committed, newest, read_manifest
from ringworld_workers.checkpoint_tools.choose import choose_newest
from ringworld_workers.data.loader import StageLoader
from ringworld_workers.engine.base import OwnedRange
from ringworld_workers.export import export_checkpoint
from ringworld_workers.learning_rate import learning_rate_at
from ringworld_workers.mesh import build_mesh
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store
from ringworld_workers.train_loop import run_stage

Gang = Callable[..., list[Any]]
Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def job(sources: dict[str, str], tmp_path: Path) -> Callable[..., StageJob]:
    """Makes jobs of this test's store."""

    def make(*, store: str = "store", **changes: Any) -> StageJob:
        return stage_job(sources, f"file://{tmp_path}/{store}", **changes)

    return make


def train(rank: int, world_size: int, job: StageJob, stop_after: int | None) -> Outcome:
    mesh = build_mesh(job.sequence_parallel_size, job.data_parallel_size, heads_size=job.heads_size)
    # One rank alone asks to stop, the last.
    reporter = Collector(stop_after if rank == world_size - 1 else None)
    try:
        result = run_stage(job, mesh, reporter)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    return {"result": result, "records": reporter.records}


@pytest.fixture
def run(run_gang: Gang) -> Callable[..., Outcome]:
    def run(job: StageJob, stop_after: int | None = None, fails: bool = False) -> Outcome:
        outcomes = run_gang(train, job.world_size, job, stop_after)
        results = [outcome["result"] for outcome in outcomes]
        assert ("error" in results[0]) == fails, results[0]
        assert all(result == results[0] for result in results)
        assert all(outcome["records"] == [] for outcome in outcomes[1:])
        return {"result": results[0], "records": outcomes[0]["records"]}

    return run


def steps(outcome: Outcome) -> list[dict[str, Any]]:
    return [record for record in outcome["records"] if record["kind"] == "step"]


def only(outcome: Outcome, kind: str) -> dict[str, Any]:
    (found,) = (record for record in outcome["records"] if record["kind"] == kind)
    return dict(found)


def manifest_of(job: StageJob) -> Manifest:
    store = open_store(job.checkpoint_url)
    ref = newest(store)
    assert ref is not None
    return read_manifest(store, ref)


def state_of(job: StageJob) -> dict[tuple[str, str], torch.Tensor]:
    """Whole weights and moments of the newest checkpoint."""
    manifest = manifest_of(job)
    reader = RangeReader(open_store(job.checkpoint_url), manifest)
    state = {}
    for name, shape in manifest.tensors.items():
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            data = torch.empty(int(np.prod(shape)))
            reader.read_into(OwnedRange(name, kind, shape, 0, data))
            state[name, kind] = data.view(shape)
    return state


LOSSES = ("loss", "loss_text", "loss_vision", "accuracy_text", "accuracy_vision", "grad_norm")


def assert_same_run(found: Outcome, expected: Outcome, first_step: int = 0) -> None:
    pairs = list(zip(steps(found), steps(expected)[first_step:], strict=True))
    assert pairs
    for one, other in pairs:
        assert one["step"] == other["step"]
        assert one["rows"] == other["rows"]
        assert one["sample_ids"] == other["sample_ids"]
        assert one["tokens"] == other["tokens"]
        assert one["learning_rate"] == other["learning_rate"]
        for name in LOSSES:
            assert one[name] == pytest.approx(other[name], abs=1e-6), (one["step"], name)
    for name, value in only(expected, "validation").items():
        if name.startswith(("loss", "accuracy", "targets", "unigram")):
            assert only(found, "validation")[name] == pytest.approx(value, abs=1e-6), name


def test_any_mesh_and_any_micro_batch_train_alike(
    job: Callable[..., StageJob], run: Callable[..., Outcome]
) -> None:
    alone = run(job(store="alone"))
    assert [record["step"] for record in steps(alone)] == list(range(1, NUM_STEPS + 1))
    assert_same_run(run(job(store="rings", data_parallel=2)), alone)
    assert_same_run(run(job(store="ring", sequence_parallel=2, micro_batch_size=2)), alone)
    grid = run(job(store="grid", sequence_parallel=4, heads=2))
    assert_same_run(grid, alone)
    start = only(grid, "stage_start")
    assert [start[f"{axis}_size"] for axis in ("ring", "heads", "data_parallel")] == [2, 2, 1]
    assert manifest_of(job(store="grid")).mesh["heads"] == 2
    assert_same_run(run(job(store="at-once", micro_batch_size=4, zero_stage=3)), alone)

    assert alone["result"] == {
        "status": "finished",
        "step": NUM_STEPS,
        "checkpoint": f"00-first/step-{NUM_STEPS:08d}",
    }
    saved = [record["step"] for record in alone["records"] if record["kind"] == "checkpoint"]
    assert saved == [2, 4, 6]
    rates = [record["learning_rate"] for record in steps(alone)]
    spec = job().stage.learning_rate
    assert rates == [learning_rate_at(spec, step, NUM_STEPS) for step in range(NUM_STEPS)]
    tokens = CONTEXT_LENGTH * ROWS_PER_STEP
    for record in steps(alone):
        assert record["tokens"] == record["step"] * tokens
        working = record["step_seconds"] - record["checkpoint_stall_seconds"]
        assert record["tokens_per_second"] == pytest.approx(tokens / working)
    # Costs are those of the whole batch, whatever this rank holds of it.
    state = manifest_of(job(store="alone")).state
    assert (state.step, state.cursor, state.final) == (NUM_STEPS, NUM_STEPS * ROWS_PER_STEP, True)
    assert state.learning_rate == rates[-1] == spec.final
    assert state.tokens == NUM_STEPS * tokens
    assert state.metrics["loss_text"] == only(alone, "validation")["loss_text"]

    check_held_out_score(job(store="alone"), only(alone, "validation"))


def check_held_out_score(job: StageJob, found: dict[str, Any]) -> None:
    """Score the same rows with a bare model, one after the other."""
    model = WorldModel(MODEL, rope_theta=job.stage.rope_theta)
    weights = {name: data for (name, kind), data in state_of(job).items() if kind == "param"}
    model.load_state_dict(weights)
    loader = StageLoader(job.sources, job.stage, job.spec.seed)
    for kind, names in (("text", ("text", None)), ("vision", ("caption", "vision"))):
        rows = loader.held_out_rows(kind, 3)  # type: ignore[arg-type]
        nll, count = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for row in rows:
            plans = plan_rows(row.document_lengths, CONTEXT_LENGTH, 1)
            with torch.no_grad():
                sums = model(row, RingContext(plans, None))
            nll += sums.nll
            count += sums.count
        for modality, name in enumerate(names):
            if name:
                assert count[modality] > 0
                assert found[f"targets_{name}"] == count[modality]
                expected = float(nll[modality] / count[modality])
                assert found[f"loss_{name}"] == pytest.approx(expected, abs=1e-6)


def test_a_run_that_stops_goes_on_as_if_it_had_not(
    job: Callable[..., StageJob], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    rings = {"data_parallel": 2, "zero_stage": 2}
    whole = run(job(store="whole", **rings))
    stopped = run(job(**rings), stop_after=3)
    assert stopped["result"] == {
        "status": "stopped",
        "step": 3,
        "checkpoint": "00-first/step-00000003",
    }
    # Also the one that the stop itself asked for.
    saved = [record["step"] for record in stopped["records"] if record["kind"] == "checkpoint"]
    assert saved == [2, 3]
    shutil.copytree(tmp_path / "store", tmp_path / "other")

    same_mesh = run(job(attempt=2, **rings))
    assert only(same_mesh, "stage_start")["resumed_from"] == "00-first/step-00000003"
    assert_same_run(same_mesh, whole, first_step=3)
    expected = state_of(job(store="whole"))
    for name, data in state_of(job()).items():
        assert torch.equal(data, expected[name]), name

    # From rings of one to a split of the heads, and from there to one rank below.
    split = {"sequence_parallel": 2, "heads": 2}
    other_mesh = run(job(store="other", attempt=2, zero_stage=3, **split))
    assert_same_run(other_mesh, whole, first_step=3)
    for name, data in state_of(job(store="other")).items():
        torch.testing.assert_close(data, expected[name], rtol=0, atol=1e-6, msg=str(name))

    # The next stage starts from either, with the moments, on yet other meshes.
    second = run(job(store="other", stage_index=1, attempt=2))
    start = only(second, "stage_start")
    assert start["resumed_from"] == f"00-first/step-{NUM_STEPS:08d}"
    assert start["step"] == 0
    assert start["backend"] == "cpu" and "the device is a cpu" in start["backend_reason"]
    assert start["layout_reason"].startswith(start["layout"])
    assert_same_run(run(job(store="whole", stage_index=1, sequence_parallel=2)), second)
    assert steps(second)[-1]["tokens"] == (NUM_STEPS + 2) * ROWS_PER_STEP * CONTEXT_LENGTH
    assert steps(second)[-1]["global_step"] == NUM_STEPS + 2
    assert manifest_of(job(store="other")).optimizer.step == NUM_STEPS + 2

    # What cannot be gone on from is refused by every rank.
    later = run(job(store="other", stage_index=0, attempt=2), fails=True)["result"]["error"]
    assert "01-second/step-00000002 is of a later stage than first" in later
    batch = 2 * CONTEXT_LENGTH * ROWS_PER_STEP
    changed = job(store="whole", stage_index=1, global_batch_tokens=batch)
    larger = run(changed, fails=True)["result"]["error"]
    assert "01-second/step-00000002 continues at row 8, but" in larger


def test_a_run_starts_from_given_weights_and_gives_its_own_away(
    job: Callable[..., StageJob], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    given = WorldModel(replace(MODEL, vision_codebook_size=0), rope_theta=1e4)
    init_weights(given, 7)
    save_pretrained(given, tmp_path / "given")

    def starting(**changes: Any) -> StageJob:
        made = job(learning_rate={"peak": 1e-30}, validation_rows=0, steps=2, **changes)
        model = {"init_from": f"hf:{tmp_path / 'given'}", "preset": "tiny", **asdict(MODEL)}
        model.pop("vision_codebook_size")
        spec = made.spec.model_dump() | {"model": model}
        return replace(made, spec=JobSpec.model_validate(spec))

    first = starting(sequence_parallel=2, zero_stage=3, precision="bf16")
    found = run(first, stop_after=1)
    (event,) = (record for record in found["records"] if record["kind"] == "weights")
    assert event["text"].startswith(f"stage first: weights from hf:{tmp_path / 'given'}")
    assert event["drawn"] == ["vision_embed.weight", "vision_head.weight"]
    # So small a rate changes no fp32 master, and masters are what was given, not its bf16.
    drawn = WorldModel(MODEL, rope_theta=1e4)
    init_weights(drawn, first.spec.seed)
    expected = dict(drawn.named_parameters()) | dict(given.named_parameters())
    for (name, kind), data in state_of(first).items():
        if kind == "param":
            assert torch.equal(data, expected[name]), name

    # A resume does not look at the source again.
    (tmp_path / "given").rename(tmp_path / "moved")
    resumed = run(starting(attempt=2))
    assert only(resumed, "stage_start")["resumed_from"] == "00-first/step-00000001"
    assert not [record for record in resumed["records"] if record["kind"] == "weights"]
    absent = run(starting(store="new"), fails=True)["result"]["error"]
    assert absent == (
        f"WeightsError: {tmp_path / 'given'}: no such folder; give the folder of a checkpoint in "
        "Hugging Face's layout"
    )

    store = open_store(first.checkpoint_url)
    ref = choose_newest(store, "first", 2)
    sink = FolderSink(tmp_path / "out")
    files = export_checkpoint(store, ref, first.spec, sink, max_shard_bytes=10_000)
    assert len(files) > 4
    again = from_pretrained(tmp_path / "out")
    assert (again.config, again.rope_theta) == (MODEL, first.stage.rope_theta)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for stage, step, message in (
        ("second", None, "stage 'second' has no committed checkpoint in .*; there are first"),
        ("first", 5, "step 5 of stage first has no committed checkpoint in .*; there are 1, 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            choose_newest(store, stage, step)
    nowhere = FolderSink(tmp_path / "other")
    other = first.spec.model_copy(
        update={"model": first.spec.model.model_copy(update={"num_layers": 3})}
    )
    with pytest.raises(CheckpointError, match=r"parameter layers\.2\.\S+ is absent in it and"):
        export_checkpoint(store, ref, other, nowhere)
    (held,) = manifest_of(first).objects
    damaged = tmp_path / "store" / held.key
    content = bytearray(damaged.read_bytes())
    content[next(part.offset for part in held.ranges if part.kind == "param")] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: the checksum of .*\(param of"):
        export_checkpoint(store, ref, first.spec, nowhere)
    assert not (tmp_path / "other").exists()


def test_a_stage_of_one_modality_has_one_loss(
    job: Callable[..., StageJob], run: Callable[..., Outcome]
) -> None:
    changes = {"mixture": {"documents": 1}, "zero_stage": 3, "steps": 2, "validation_rows": 0}
    memory = {
        "activation_checkpointing": "attention_saved",
        "activation_offload": True,
        "mlp_tile_tokens": 32,
        "optimizer_offload": True,
        "parameter_offload": True,
    }
    found = run(job(sequence_parallel=2, memory=memory, **changes))
    assert [record["loss"] == record["loss_text"] for record in steps(found)] == [True, True]
    assert all("loss_vision" not in record for record in steps(found))
    assert not [record for record in found["records"] if record["kind"] == "validation"]


def test_a_loss_that_is_no_number_stops_every_rank(
    job: Callable[..., StageJob], run: Callable[..., Outcome]
) -> None:
    rate = {"peak": 1e30}
    found = run(job(data_parallel=2, learning_rate=rate), fails=True)
    assert re.match(r"TrainingDiverged: \w+ is (inf|nan) at step 2 of", found["result"]["error"])
    assert committed(open_store(job().checkpoint_url)) == []


def train_to_a_broken_score(rank: int, world_size: int, job: StageJob) -> Outcome:
    train_loop.score_held_out = lambda *_: {"loss_text": float("nan")}
    return train(rank, world_size, job, None)


def test_a_stage_whose_score_is_no_number_is_not_saved(
    job: Callable[..., StageJob], run_gang: Gang
) -> None:
    (found,) = run_gang(train_to_a_broken_score, 1, job(steps=1))
    error = found["result"]["error"]
    assert error.startswith("TrainingDiverged: loss_text is nan at step 1 of stage first")
    assert committed(open_store(job().checkpoint_url)) == []


class Healing(Collector):
    """Clears what is in the way of the checkpoints, once the first of them has failed."""

    def __init__(self, obstacle: Path, heals: bool, stop_after: int | None) -> None:
        super().__init__(stop_after)
        self._obstacle, self._heals = obstacle, heals

    def metrics(self, record: dict[str, Any]) -> None:
        super().metrics(record)
        if self._heals and record["kind"] == "checkpoint_failed":
            # A rank that was quick may fail once more: then a folder is there already.
            if self._obstacle.is_file():
                self._obstacle.unlink()


def train_beside_a_file(
    rank: int, world_size: int, job: StageJob, heals: bool, stop_after: int | None
) -> Outcome:
    """A file lies where the stage's folder should be."""
    mesh = build_mesh(job.sequence_parallel_size, job.data_parallel_size)
    obstacle = Path(job.checkpoint_url.removeprefix("file://")) / "00-first"
    if rank == 0:
        obstacle.parent.mkdir()
        obstacle.touch()
    reporter = Healing(obstacle, heals, stop_after if rank == 1 else None)
    try:
        result = run_stage(job, mesh, reporter)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    return {"result": result, "records": reporter.records}


def test_training_outlives_a_store_that_fails_for_a_while(
    job: Callable[..., StageJob], run_gang: Gang
) -> None:
    made = job(sequence_parallel=2, validation_rows=0)
    found, other = run_gang(train_beside_a_file, 2, made, True, None)
    ends = [outcome["result"].get("status", outcome["result"]) for outcome in (found, other)]
    assert ends == ["finished", "finished"]
    failed = [r for r in found["records"] if r["kind"] == "checkpoint_failed" and "step" in r]
    assert (failed[0]["step"], failed[0]["failed"], failed[0]["failed_in_row"]) == (2, 1, 1)
    assert "a part of the path is a file" in failed[0]["error"]
    saved = [record for record in found["records"] if record["kind"] == "checkpoint"]
    assert [record["step"] for record in [*failed, *saved]] == [2, 4, 6]
    assert saved and {record["failed"] for record in saved} == {len(failed)}
    for record in saved:
        assert record["bytes_per_second"] == record["bytes"] / record["upload_seconds"] > 0
        assert record["skipped"] == 0 and record["waited_seconds"] >= 0


def test_a_stage_that_cannot_be_saved_ends_with_the_first_cause(
    job: Callable[..., StageJob], run_gang: Gang
) -> None:
    made = job(data_parallel=2, validation_rows=0, every="1 steps")
    limit = made.spec.checkpoint.model_copy(update={"max_failures": 1})
    made = replace(made, spec=made.spec.model_copy(update={"checkpoint": limit}))
    outcomes = run_gang(train_beside_a_file, 2, made, False, None)
    (error,) = {outcome["result"]["error"] for outcome in outcomes}
    assert error.startswith(
        "CheckpointError: 2 checkpoints in a row could not be saved (checkpoint.max_failures is 1)"
        "; the first: checkpoint 00-first/step-00000001 is not committed; rank 0: put "
    )
    assert error.endswith("resume the run: it goes on from the initial weights")


def test_a_stop_says_if_it_could_not_be_saved(job: Callable[..., StageJob], run_gang: Gang) -> None:
    outcomes = run_gang(train_beside_a_file, 2, job(data_parallel=2), False, 1)
    assert outcomes[0]["result"] == outcomes[1]["result"]
    result = outcomes[0]["result"]
    assert (result["status"], result["step"], result["checkpoint"]) == ("stopped", 1, None)
    text = result["unsaved"]
    assert text.startswith("stopped at step 1 of stage first, but its state is not saved: ")
    assert "a part of the path is a file" in text
    assert [r for r in outcomes[0]["records"] if r.get("text") == text]


def test_a_run_goes_on_without_its_damaged_end_and_gives_its_weights_to_another(
    job: Callable[..., StageJob], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    place = "source/checkpoints"
    whole = run(job(store=place, data_parallel=2, zero_stage=2))
    expected = state_of(job(store=place))
    folder = tmp_path / place / f"00-first/step-{NUM_STEPS:08d}"
    held = tmp_path / place / manifest_of(job(store=place)).objects[1].key
    content = bytearray(held.read_bytes())
    content[len(content) // 2] ^= 1
    held.write_bytes(content)
    again = job(store=place, attempt=2, sequence_parallel=2, zero_stage=3)
    error = run(again, fails=True)["result"]["error"]
    assert error.startswith("DamagedCheckpoint: rank ")
    assert f"{held.name} is damaged: the checksum of bytes" in error
    assert f"older checkpoint is 00-first/step-{NUM_STEPS - 2:08d}: take it by" in error

    older = run(replace(again, attempt=3, take_older=True))
    (event,) = (record for record in older["records"] if record["kind"] == "damaged_checkpoint")
    assert event["checkpoint"] == f"00-first/step-{NUM_STEPS:08d}"
    assert_same_run(older, whole, first_step=NUM_STEPS - 2)
    assert (folder / "manifest.json").is_file(), "the step is saved anew, in the same place"
    for name, data in state_of(job(store=place)).items():
        torch.testing.assert_close(data, expected[name], rtol=0, atol=1e-6, msg=str(name))

    # Another run begins with these weights, and its first stage with the moments.
    made = job(
        store="other", zero_stage=1, steps=1, validation_rows=0, optimizer_state="inherit",
        learning_rate={"peak": 1e-30},
    )  # fmt: skip
    init_from = f"run:file://{folder}"
    spec = made.spec.model_dump() | {
        "model": made.spec.model.model_dump() | {"init_from": init_from}
    }
    found = run(replace(made, run_id="other-1", spec=JobSpec.model_validate(spec)))
    assert only(found, "weights")["text"] == (
        f"stage first: weights and optimizer state from {init_from}, after "
        f"{NUM_STEPS * ROWS_PER_STEP * CONTEXT_LENGTH} tokens"
    )
    assert only(found, "stage_start")["resumed_from"] is None
    assert manifest_of(made).optimizer.step == NUM_STEPS + 1
    source = state_of(job(store=place))
    for (name, kind), data in state_of(made).items():
        if kind == "param":
            assert torch.equal(data, source[name, kind]), name
