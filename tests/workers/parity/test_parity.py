"""Parity: a right ring passes on a job's own rows, and each way of being wrong is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from ringworld_jobs.spec import JobSpec
from ringworld_model.batch import TrainBatch, cut
from ringworld_model.ring import RingContext, RingPlan, plan_ring, rectangles, ring_attention
from ringworld_model.ring.clusters import Cluster, Cut
from ringworld_workers.data.files import DataError
from ringworld_workers.parity.case import ParityCase, Precision, build_case
from ringworld_workers.parity.compare import compare_rank
from ringworld_workers.parity.report import TOLERANCES, ParityReport, RingParity
from ringworld_workers.parity.rows import JobData, as_one_document, shortened


def small_case(job: tuple[JobSpec, JobData], precision: Precision = "fp64") -> ParityCase:
    return build_case(*job, ring_sizes=[2, 1, 3], context_length=640, precision=precision)


def test_the_case_is_the_jobs_own(job: tuple[JobSpec, JobData]) -> None:
    case = small_case(job)
    packed, dense = case.rows["packed"], case.rows["dense"]
    assert case.stage == "second"
    assert [tuple(shape) for shape in case.ring_sizes] == [(1, 1), (2, 1), (3, 1)]
    assert case.model_config.num_layers == 2
    assert case.model_config.vision_codebook_size == 16
    assert case.memory.activation_checkpointing == "attention_saved"
    assert (case.context_length, case.stage_context_length) == (640, 1536)
    assert len(packed.document_lengths[0]) > 3
    assert set(packed.modality.unique().tolist()) == {0, 1}
    assert dense.document_lengths == ((sum(packed.document_lengths[0]),),)
    assert torch.equal(packed.tokens, dense.tokens)
    assert [note.split(" are ")[0] for note in case.notes] == [
        "the first 2 of 3 layers",
        "rows",
    ]


def without_the_second_step() -> AbstractContextManager[object]:
    """Every rank forgets what the keys of the rank before it would have added."""
    whole = rectangles.cut_step

    def dropped(
        cut: Cut, dtype: torch.dtype, plan: RingPlan, rank: int, step: int, backward: bool
    ) -> list[Cluster]:
        return [] if step == 1 else whole(cut, dtype, plan, rank, step, backward)

    return mock.patch.object(rectangles, "cut_step", dropped)


class LocalValueGradient(RingContext):
    """The forward pass is right; the values' gradient of other ranks' queries is lost."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return super().attend(q, k, v)
        remote = ring_attention(q, k, v.detach(), plan=self.plans, group=self.group)
        local = ring_attention(
            q.detach(), k.detach(), v, plan=plan_ring([q.shape[1]], q.shape[1], 1)
        )
        return remote + (local - local.detach())


class LeakingDocuments(RingContext):
    """Attends across documents."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        merged = [
            plan_ring([sum(p.document_lengths)], p.context_length, p.ring_size, p.layout)
            for p in self.plans
        ]
        return ring_attention(q, k, v, plan=merged, group=self.group)


class HalfPrecision(RingContext):
    """Keeps the attention's result in bf16."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = super().attend(q, k, v)
        return out.bfloat16().to(out.dtype) if self.group is not None else out


def positions_of_the_share(batch: TrainBatch, plans: Sequence[RingPlan], rank: int) -> TrainBatch:
    """RoPE counts within the rank's share, as if it were the row."""
    local = cut(batch, plans, rank)
    positions = torch.arange(local.tokens.shape[1], dtype=torch.int32).expand_as(local.tokens)
    return replace(local, position_ids=positions)


def everything(
    rank: int, world_size: int, cases: dict[str, ParityCase]
) -> dict[str, list[RingParity]]:
    """The ring as it is, and with each defect, in one set of processes."""
    found = {name: compare_rank(rank, world_size, case) for name, case in cases.items()}
    case = cases["fp32"]
    for context in (LocalValueGradient, LeakingDocuments, HalfPrecision):
        found[context.__name__] = compare_rank(rank, world_size, case, context=context)
    found["positions"] = compare_rank(rank, world_size, case, cut_rows=positions_of_the_share)
    with without_the_second_step():
        found["dropped step"] = compare_rank(rank, world_size, case)
    return found


@pytest.fixture(scope="module")
def found(
    job: tuple[JobSpec, JobData], run_gang: Callable[..., list[Any]]
) -> dict[str, list[RingParity]]:
    cases = {precision: small_case(job, precision) for precision in ("fp32", "fp64")}
    return run_gang(everything, 3, cases, timeout=240.0)[0]


def failing(results: list[RingParity]) -> set[tuple[str, int]]:
    return {(r.packing, r.ring_size) for r in results if not r.passed}


RINGS = {(packing, size) for packing in ("packed", "dense") for size in (2, 3)}
ALONE = {("packed", 1), ("dense", 1)}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_rings_give_one_ranks_gradients(
    job: tuple[JobSpec, JobData], found: dict[str, list[RingParity]], precision: Precision
) -> None:
    report = ParityReport(small_case(job, precision), found[precision], 1.0)
    written = report.to_json()
    assert report.passed, written
    assert written["passed"] is True
    assert {(ring["packing"], ring["ring_size"]) for ring in written["rings"]} == RINGS | ALONE
    # Two tables, two heads, a norm, and nine parameters a layer.
    assert len(written["rings"][0]["gradient_errors"]) == 2 + 2 + 1 + 2 * 9
    losses = {ring.packing: ring.loss for ring in report.rings}
    assert losses["packed"] != losses["dense"], "packing makes no difference here"


@pytest.mark.parametrize(
    ("defect", "where"),
    [
        ("dropped step", RINGS),
        ("LocalValueGradient", RINGS),
        ("HalfPrecision", RINGS),
        ("LeakingDocuments", {("packed", size) for size in (1, 2, 3)}),
        ("positions", RINGS),  # on one rank each document moves as a whole, and RoPE is relative
    ],
)
def test_every_defect_is_seen(
    found: dict[str, list[RingParity]], defect: str, where: set[tuple[str, int]]
) -> None:
    assert failing(found[defect]) == where


def test_a_wrong_gradient_is_seen_where_the_loss_is_right(
    found: dict[str, list[RingParity]],
) -> None:
    for ring in found["LocalValueGradient"]:
        assert ring.loss_difference <= TOLERANCES["fp32"].loss


def test_a_number_that_is_none_never_passes() -> None:
    ring = RingParity("packed", 2, "zigzag", "cpu", 1.0, 1.0, 0.0, 0.0, {"a": 0.0, "b": np.inf})
    assert ring.worst == ("b", np.inf)
    assert not ring.passed


def test_shortened_rows_keep_their_documents(job: tuple[JobSpec, JobData]) -> None:
    spec, data = job
    rows = build_case(spec, data, context_length=1536).rows["packed"]
    few = shortened(rows, 100)
    lengths, kept = rows.document_lengths[0], few.document_lengths[0]
    assert kept == tuple(max(1, n * 100 // 1536) for n in lengths)
    starts, at = np.cumsum([0, *lengths]), 0
    for document, length in enumerate(kept):
        here, there = slice(at, at + length), slice(starts[document], starts[document] + length)
        for name in ("tokens", "targets", "loss_weights", "position_ids", "segment_ids"):
            assert torch.equal(getattr(few, name)[0, here], getattr(rows, name)[0, there]), name
        at += length
    assert not few.segment_ids[0, at:].any()
    assert not few.loss_weights[0, at:].any()
    assert shortened(rows, 4096) is rows
    crowded = shortened(rows, 2)
    assert crowded.document_lengths == ((1, 1),)
    assert as_one_document(few).position_ids[0, at - 1] == at - 1


def test_what_cannot_be_checked_is_refused(job: tuple[JobSpec, JobData]) -> None:
    with pytest.raises(ValueError, match="'third' is unknown; the job has first, second"):
        build_case(*job, stage_name="third")
    with pytest.raises(ValueError, match=r"ring_sizes=\[0\]"):
        build_case(*job, ring_sizes=[0])
    spec, data = job
    narrow = replace(data, model_config=replace(data.model_config, text_vocab_size=8))
    with pytest.raises(DataError, match="model.text_vocab_size=8"):
        build_case(spec, narrow)


def test_a_report_holds_no_nan(job: tuple[JobSpec, JobData]) -> None:
    case = small_case(job)
    ring = RingParity("packed", 2, "zigzag", "cpu", np.nan, 1.0, np.inf, 0.0, {"a": 0.0})
    written = ParityReport(case, [ring], 1.0).to_json()
    assert written["rings"][0]["loss"] is None
    assert written["rings"][0]["loss_difference"] is None
    assert written["passed"] is False
