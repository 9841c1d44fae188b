"""A stage proves its ring before it trains: on its own ranks, device, kernel and process groups.

Every ring takes the first rows that it would train on. Its first rank computes them alone, then all
of its ranks do together, exactly as a training step would; the results must agree.
"""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed as dist

from ringworld_jobs.spec import ParitySpec
from ringworld_model.batch import TENSOR_FIELDS, TrainBatch
from ringworld_workers.data.loader import StageLoader
from ringworld_workers.mesh import Mesh
from ringworld_workers.micro_batch import prepare_micro_batch
from ringworld_workers.parity.case import ParityCase, RingShape, case_of
from ringworld_workers.parity.compare import (
    OneRank,
    build_model,
    chosen_backend,
    kernel_precisions,
    train_ring,
)
from ringworld_workers.parity.report import ParityReport, RingParity
from ringworld_workers.reporter import Reporter
from ringworld_workers.stage_job import StageJob
from ringworld_workers.strict_json import finite

log = logging.getLogger(__name__)


class ParityFailed(RuntimeError):
    """A stage's ring does not compute what one rank does; nothing was trained."""


def prove_ring(
    job: StageJob, mesh: Mesh, reporter: Reporter, loader: StageLoader, asked: ParitySpec
) -> None:
    """Compare each ring with one rank, and report. A collective: every rank of the gang calls it.

    Args:
        job: whose stage is about to train.
        mesh: this rank's place.
        reporter: takes the finding, on rank 0.
        loader: the stage's rows.
        asked: how much to compute.

    Raises:
        ParityFailed: a ring is wrong; says where. Raised on every rank.
        DataError: the rows hold no target.
        ValueError: no kernel runs here.
    """
    began = time.monotonic()
    reporter.phase("parity", 0)
    case = _case(job, mesh, loader, asked)
    mine = _compare(case, job, mesh, reporter)
    everyones: list[list[RingParity]] = [[] for _ in range(mesh.world_size)]
    dist.all_gather_object(everyones, mine, group=mesh.control_group)
    rings = [ring for found in everyones for ring in found]
    if mesh.device.type == "cuda":
        # What was needed for a moment is neither kept from the engine nor counted as training's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(mesh.device)
    report = ParityReport(case, rings, time.monotonic() - began)
    if mesh.rank == 0:
        _tell(report, job, mesh, reporter)
    if not report.passed:
        raise ParityFailed(
            f"parity of stage {job.stage.name}: {_where(report.worst, mesh)}{_sentence(report)}; "
            "nothing was trained. Run `ringworld parity` on the job, try attention.backend: "
            "reference and another attention.layout to see which part is wrong, or report it with "
            "parity.json; parity: false trains without the proof"
        )


def _case(job: StageJob, mesh: Mesh, loader: StageLoader, asked: ParitySpec) -> ParityCase:
    shape = RingShape(mesh.ring_size, mesh.heads_size)
    return case_of(
        job.spec,
        job.stage,
        job.model_config,
        _first(loader.step_rows(0)[0], asked.rows),
        ring_sizes=(shape,),
        num_layers=asked.layers,
        precision=job.stage.precision,
        context_length=asked.context_length,
    )


def _first(rows: TrainBatch, count: int) -> TrainBatch:
    tensors = {name: getattr(rows, name)[:count] for name in TENSOR_FIELDS}
    return TrainBatch(**tensors, document_lengths=rows.document_lengths[:count])


def _compare(case: ParityCase, job: StageJob, mesh: Mesh, reporter: Reporter) -> list[RingParity]:
    """This ring's results, on its first rank."""
    stage = job.stage.model_copy(update={"context_length": case.context_length})
    precisions = kernel_precisions(case, mesh.device)
    first = mesh.sequence_parallel_rank == 0
    one_rank = OneRank(case, mesh.device) if first else None
    model = build_model(case, case.memory, mesh.device)
    found = []
    for packing, rows in case.rows.items():
        for precision in precisions:
            reporter.phase("parity", 0)
            backend = chosen_backend(case, precision, mesh.device)
            batch = prepare_micro_batch(rows, stage, mesh, backend)
            trained = train_ring(
                case, model, precision, rows, batch.local, batch.ring, mesh.sequence_parallel_group
            )
            if one_rank is not None:
                found.append(
                    one_rank.judge(
                        packing,
                        precision,
                        trained,
                        batch.ring.plans[0],
                        backend,
                        case.ring_sizes[0],
                        ring=mesh.data_parallel_rank,
                    )
                )
    return found


def _tell(report: ParityReport, job: StageJob, mesh: Mesh, reporter: Reporter) -> None:
    """Rank 0: the finding for the log, the events and parity.json."""
    worst = report.worst
    name, error = worst.worst
    shape = {
        "ring_size": worst.ring_size,
        "heads_size": worst.heads_size,
        "data_parallel_size": mesh.data_parallel_size,
        "device": mesh.device.type,
    }
    for ring in report.rings:
        (log.info if ring.passed else log.error)("parity: %s", ring.sentence())
    reporter.metrics(
        job.record(
            "parity",
            0,
            passed=report.passed,
            **shape,
            precision=worst.precision,
            layout=worst.layout,
            backend=worst.backend,
            loss_difference=finite(worst.loss_difference),
            grad_norm_difference=finite(worst.grad_norm_difference),
            gradient_error=finite(error),
            gradient_limit=worst.limit(name),
            worst_parameter=name,
            check_seconds=report.seconds,
            report={**report.to_json(), "mesh": shape},
        )
    )
    verdict = "gives" if report.passed else "does NOT give"
    reporter.event(
        {
            "kind": "parity",
            "text": f"stage {job.stage.name}: the ring {verdict} one worker's loss and gradients; "
            f"{_where(worst, mesh)}{_sentence(report)}; {report.seconds:.1f} s",
            "passed": report.passed,
        }
    )


def _where(ring: RingParity, mesh: Mesh) -> str:
    return f"ring {ring.ring} of {mesh.data_parallel_size}, " if mesh.data_parallel_size > 1 else ""


def _sentence(report: ParityReport) -> str:
    return report.worst.sentence()
