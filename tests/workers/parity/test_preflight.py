"""A stage proves its ring on its own ranks before it trains, or does not train."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from ringworld_jobs.spec import JobSpec
from ringworld_model.ring import RingPlan, rectangles
from ringworld_model.ring.clusters import Cluster, Cut
from ringworld_workers.data.loader import open_loader
from ringworld_workers.mesh import Mesh, build_mesh
from ringworld_workers.parity.preflight import prove_ring
from ringworld_workers.parity.rows import JobData
from ringworld_workers.recorder import Recorder
from ringworld_workers.stage_job import StageJob
from ringworld_workers.train_loop import run_stage

RANKS = 4


def stage_job(
    job: tuple[JobSpec, JobData], ring_size: int, heads_size: int = 1, **stage: Any
) -> StageJob:
    spec, data = job
    num_rings = RANKS // (ring_size * heads_size)
    given = spec.stages[-1].model_dump() | {"global_batch_tokens": num_rings * 1536} | stage
    spec = JobSpec.model_validate(spec.model_dump() | {"stages": [given]})
    return StageJob(
        run_id="small-1",
        spec=spec,
        stage_index=0,
        attempt=1,
        world_size=RANKS,
        sequence_parallel_size=ring_size * heads_size,
        heads_size=heads_size,
        data_parallel_size=num_rings,
        device="cpu",
        data_dir="",
        sources=data.sources,
        model_config=data.model_config,
        checkpoint_url="file:///nowhere",
        spec_digest="d",
    )


def forgotten_step() -> AbstractContextManager[object]:
    """The last rank of a ring forgets one step of one document."""
    whole = rectangles.cut_step

    def fewer(
        cut: Cut, dtype: torch.dtype, plan: RingPlan, rank: int, step: int, backward: bool
    ) -> list[Cluster]:
        found = whole(cut, dtype, plan, rank, step, backward)
        return found[1:] if (rank, step) == (plan.ring_size - 1, 1) else found

    return mock.patch.object(rectangles, "cut_step", fewer)


def mesh_of(job: StageJob) -> Mesh:
    sizes = (job.sequence_parallel_size, job.data_parallel_size)
    return build_mesh(*sizes, heads_size=job.heads_size)


def prove(job: StageJob) -> dict[str, Any]:
    """What one rank says and raises when its stage begins."""
    mesh = mesh_of(job)
    recorder, error = Recorder(), ""
    try:
        assert job.stage.preflight is not None
        prove_ring(job, mesh, recorder, open_loader(job, mesh), job.stage.preflight)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"error": error, **said(recorder)}


def start(job: StageJob) -> dict[str, Any]:
    """The same through the stage itself."""
    mesh = mesh_of(job)
    recorder, error = Recorder(), ""
    try:
        run_stage(job, mesh, recorder)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"error": error, **said(recorder)}


def said(recorder: Recorder) -> dict[str, Any]:
    entries = recorder.drain(0)
    return {kind: [e.data for e in entries if e.kind == kind] for kind in ("metrics", "event")}


def everything(rank: int, world_size: int, jobs: dict[str, StageJob]) -> dict[str, Any]:
    """All of it in one set of processes."""
    found = {}
    for name, job in jobs.items():
        with forgotten_step() if name == "wrong" else nullcontext():
            found[name] = start(job) if name == "wrong" else prove(job)
    return found


@pytest.fixture(scope="module")
def found(job: tuple[JobSpec, JobData], run_gang: Callable[..., list[Any]]) -> list[dict[str, Any]]:
    little = {"layers": 1, "context_length": "640"}
    jobs = {
        "ring": stage_job(job, 4, parity=little),
        "places": stage_job(job, 2, 2, parity=little),
        "rings": stage_job(job, 1, parity=little),
        "bf16": stage_job(job, 4, parity=little, precision="bf16"),
        "wrong": stage_job(job, 4, parity=little, precision="bf16"),
    }
    return run_gang(everything, RANKS, jobs, timeout=120.0)


def proof_of(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (record,) = found[0][name]["metrics"]
    assert all(rank[name]["metrics"] == [] for rank in found[1:])
    return dict(record)


def test_a_right_ring_is_proved_and_told(found: list[dict[str, Any]]) -> None:
    proof = proof_of(found, "ring")
    assert all(rank["ring"]["error"] == "" for rank in found)
    assert (proof["kind"], proof["stage"], proof["step"], proof["passed"]) == (
        *("parity", "second", 0),
        True,
    )
    assert (proof["ring_size"], proof["data_parallel_size"], proof["device"]) == (4, 1, "cpu")
    assert 0 < proof["gradient_error"] < proof["gradient_limit"] == 1e-5
    assert proof["check_seconds"] > 0
    json.dumps(proof, allow_nan=False)
    report = proof["report"]
    assert [ring["packing"] for ring in report["rings"]] == ["packed", "dense"]
    assert report["mesh"]["ring_size"] == 4
    assert len(report["notes"]) == 2 and report["context_length"] == 640
    (event,) = found[0]["ring"]["event"]
    assert "stage second: the ring gives one worker's loss and gradients" in event["text"]


def test_ranks_that_split_the_heads_are_proved_too(found: list[dict[str, Any]]) -> None:
    proof = proof_of(found, "places")
    assert (proof["ring_size"], proof["heads_size"], proof["passed"]) == (2, 2, True)
    # Not by computing each for itself: the sums differ from one rank's in their last bits.
    assert all(ring["worst_error"] > 0 for ring in proof["report"]["rings"])


def test_every_ring_takes_rows_of_its_own(found: list[dict[str, Any]]) -> None:
    rings = proof_of(found, "rings")["report"]["rings"]
    assert [(ring["ring"], ring["packing"]) for ring in rings] == [
        (number, packing) for number in range(4) for packing in ("packed", "dense")
    ]
    assert len({ring["loss"] for ring in rings}) == 8


def test_half_precision_is_held_against_one_rank_and_fp32(found: list[dict[str, Any]]) -> None:
    proof = proof_of(found, "bf16")
    rings = {(r["packing"], r["precision"]): r for r in proof["report"]["rings"]}
    assert proof["passed"] and len(rings) == 4
    for packing in ("packed", "dense"):
        assert rings[packing, "fp32"]["worst_error"] < 1e-5
        half = rings[packing, "bf16"]
        for name, error in half["gradient_errors"].items():
            one_rank = half["one_rank"]["gradients"][name]
            assert 1e-4 < one_rank < 0.1
            assert error <= 1.5 * one_rank + 2**-9


def test_a_wrong_ring_is_seen_in_half_precision_too(found: list[dict[str, Any]]) -> None:
    rings = proof_of(found, "wrong")["report"]["rings"]
    assert {r["precision"] for r in rings if not r["passed"]} == {"fp32", "bf16"}


def test_a_wrong_ring_stops_every_rank_before_anything_is_trained(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        error = rank["wrong"]["error"]
        assert error == found[0]["wrong"]["error"]
        for words in (
            "ParityFailed: parity of stage second:",
            "rows, fp32, ring 4 in",
            "the gradient of layers.0.",
            "is off by",
            "(1.0e-05 is allowed)",
            "nothing was trained",
            "attention.backend: reference",
        ):
            assert words in error, (words, error)
    # No stage_start, no step: the proof is all that the stage has said.
    assert proof_of(found, "wrong")["passed"] is False
    (event,) = found[0]["wrong"]["event"]
    assert "does NOT give" in event["text"]
