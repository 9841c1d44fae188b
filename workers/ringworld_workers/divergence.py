"""What is known of a step that diverged: collected over all ranks, told, and raised.

Every rank runs the same functions at the same step, because all judge the same numbers.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ringworld_workers.checkpoint.exchange import all_gather_json
from ringworld_workers.data.loader import StageLoader
from ringworld_workers.engine.base import Engine
from ringworld_workers.guard import Finding, TrainingDiverged
from ringworld_workers.mesh import Mesh
from ringworld_workers.micro_batch import MicroBatch
from ringworld_workers.reporter import Reporter
from ringworld_workers.stage_job import StageJob
from ringworld_workers.step_probe import MOST_NAMES, StepProbe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepAtHand:
    """A step that has been taken, as this rank knows it.

    Attributes:
        step: counted from 1.
        batches: this rank's micro-batches.
        weight: [2], loss weights of the global batch.
        shares: of text and vision in the loss.
        learning_rate: that it was taken with.
        local: of each micro-batch, this rank's own sums: float64 [3, 2], nll, correct and count by
            modality.
    """

    step: int
    batches: Sequence[MicroBatch]
    weight: torch.Tensor
    shares: tuple[float, float]
    learning_rate: float
    local: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Gang:
    """Who is asked."""

    job: StageJob
    mesh: Mesh
    engine: Engine
    loader: StageLoader
    reporter: Reporter


def warn(gang: Gang, finding: Finding, history: Sequence[Mapping[str, float]], at: int) -> None:
    """Tell of a jump after which training goes on. Local: nobody is asked."""
    if gang.mesh.rank:
        return
    text = f"{finding} at step {at} of stage {gang.job.stage.name}"
    log.warning("%s", text)
    rows = gang.loader.row_range(at - 1)
    gang.reporter.event(
        {
            "kind": "loss_spike",
            "text": text,
            "step": at,
            "value": finding.value,
            "usual": finding.usual,
            "limit": finding.limit,
            "rows": [rows.start, rows.stop],
            "history": _plain(list(history)),
        }
    )


def diverged(
    gang: Gang, finding: Finding, at: StepAtHand, history: Sequence[Mapping[str, float]]
) -> TrainingDiverged:
    """The error to raise, once what is known has been told. A collective.

    Args:
        gang: whose step it was.
        finding: what is not sound.
        at: the step.
        history: numbers of the steps up to it.
    """
    job = gang.job
    facts = {
        "kind": finding.kind,
        "action": finding.action,
        "step": at.step,
        "skip_steps": list(range(max(1, at.step - finding.skip_steps + 1), at.step + 1)),
    }
    where = f"at step {at.step} of stage {job.stage.name}"
    remedy = _remedy(finding)
    try:
        ranks = all_gather_json(_plain(_of_this_rank(gang, finding, at)), gang.mesh)
    except Exception as error:
        # What was to explain the failure must not replace it.
        log.exception("the step could not be looked at")
        return TrainingDiverged(f"{finding} {where} (no more is known: {error}); {remedy}", facts)
    if any(rank["broken_state"] for rank in ranks) and at.step > 1:
        # The step before made them so; the rows at hand only showed it.
        facts["skip_steps"] = [at.step - 1]
    odd, why = _odd_rank(ranks, finding)
    text = f"{finding} {where}: rank {odd} {why}; {remedy}"
    if gang.mesh.rank == 0:
        rows = gang.loader.row_range(at.step - 1)
        data = {
            **facts,
            "text": text,
            "stage": job.stage.name,
            "attempt": job.attempt,
            "name": finding.name,
            "value": finding.value,
            "usual": finding.usual,
            "limit": finding.limit,
            "odd_rank": odd,
            "rows": [rows.start, rows.stop],
            "samples": _samples(gang.loader, at.step - 1),
            "learning_rate": at.learning_rate,
            "loss_factor": gang.engine.loss_factor,
            "precision": job.stage.precision,
            "history": list(history),
            "ranks": ranks,
        }
        name = f"step-{at.step:08d}-{finding.kind}"
        gang.reporter.event({"kind": "evidence", "text": text, "name": name, "data": _plain(data)})
    return TrainingDiverged(text, facts)


def _of_this_rank(gang: Gang, finding: Finding, at: StepAtHand) -> dict[str, Any]:
    mesh, loader = gang.mesh, gang.loader
    broken = [
        f"{owned.tensor} ({owned.kind})"
        for owned in gang.engine.owned_ranges()
        if not bool(torch.isfinite(owned.data).all())
    ]
    nll = [part[0].tolist() for part in at.local]
    count = [part[2].tolist() for part in at.local]
    rows = loader.row_range(at.step - 1)
    share = len(rows) // mesh.data_parallel_size
    first = rows.start + mesh.data_parallel_rank * share
    found: dict[str, Any] = {
        "rank": mesh.rank,
        "data_parallel_rank": mesh.data_parallel_rank,
        "sequence_parallel_rank": mesh.sequence_parallel_rank,
        "rows": [first, first + share],
        "nll_by_micro_batch": nll,
        "targets_by_micro_batch": count,
        "rng": {
            "seed": torch.initial_seed(),
            "state": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16],
        },
        "broken_state": broken[:MOST_NAMES],
        "num_broken_state": len(broken),
    }
    # A step with a gradient that is not finite changes no weight: it can be looked at once more.
    # After a jump the weights are those that the jump has made.
    gang.reporter.phase("evidence", at.step)
    probe = StepProbe(gang.engine)
    probe.watch(at.batches, at.weight, at.shares)
    return {**found, **probe.findings(), "weights_of_step": at.step - (finding.kind == "nan")}


def _odd_rank(ranks: Sequence[dict[str, Any]], finding: Finding) -> tuple[int, str]:
    """Which rank stands out, and by what."""
    for rank in ranks:
        if rank["broken_state"]:
            return rank["rank"], (
                f"holds {rank['num_broken_state']} tensors with NaN or Inf since the step before, "
                f"{rank['broken_state'][0]} first"
            )
    seen = [rank for rank in ranks if rank["first"] is not None]
    if seen:
        first = min(seen, key=lambda r: (r["first"]["micro_batch"], r["first"]["order"], r["rank"]))
        place = first["first"]
        return first["rank"], (
            f"(rows {first['rows'][0]} to {first['rows'][1] - 1}) had it first, out of "
            f"{place['module']} in micro-batch {place['micro_batch'] + 1}"
        )
    graded = [rank for rank in ranks if rank["broken_gradients"]]
    if graded:
        # The backward pass goes the same way on all ranks: where it broke last, it broke later.
        first = max(graded, key=lambda r: (r["num_broken_gradients"], -r["rank"]))
        return first["rank"], f"had it first, in the gradient of {first['broken_gradients'][0]}"
    if finding.kind == "nan":
        return 0, "and all others find finite numbers when the step is computed once more"
    if finding.name == "grad_norm":
        most = max(ranks, key=lambda r: _norm(r["gradient_norms"]))
        return most["rank"], (
            f"(rows {most['rows'][0]} to {most['rows'][1] - 1}) has the largest gradient of its "
            f"own, {_norm(most['gradient_norms']):.6g}"
        )
    modality = 1 if finding.name == "loss_vision" else 0
    most = max(ranks, key=lambda rank: _loss(rank, modality))
    return most["rank"], (
        f"(rows {most['rows'][0]} to {most['rows'][1] - 1}) has the largest loss of its own, "
        f"{_loss(most, modality):.6g}"
    )


def _norm(parts: Mapping[str, float]) -> float:
    return math.hypot(*parts.values()) if parts else 0.0


def _loss(rank: Mapping[str, Any], modality: int) -> float:
    """Of a rank alone: weighted nll over the number of its targets, of one modality."""
    nll = sum(each[modality] or 0.0 for each in rank["nll_by_micro_batch"])
    return nll / max(1.0, sum(each[modality] for each in rank["targets_by_micro_batch"]))


def _samples(loader: StageLoader, step: int) -> list[dict[str, Any]]:
    """What each row of a step holds, over all rings."""
    ids = iter(loader.sample_ids(step))
    return [
        {"row": row, "samples": [next(ids) for _ in lengths]}
        for row, lengths in zip(loader.row_range(step), loader.document_lengths(step), strict=True)
    ]


def _remedy(finding: Finding) -> str:
    if finding.action == "rollback":
        return "the rows are left out from the newest checkpoint on"
    field = "on_nan" if finding.kind == "nan" else "loss_spike.action"
    return (
        "the newest committed checkpoint is sound: lower learning_rate.peak and resume from it, or "
        f"set recovery.{field} to rollback to leave these rows out"
    )


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor Inf: they become words."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
