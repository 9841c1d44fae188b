"""Parity: a job's own model and rows give one rank's loss and gradients on every ring.

The one rank computes attention with torch's own causal kernel, one document at a time: nothing of
the ring (plan, cut, merge, transfer) is in it. The rings are real processes over gloo, on the CPU.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ringworld_jobs.spec import JobSpec
from ringworld_jobs.units import format_tokens
from ringworld_model.batch import NUM_MODALITIES, TrainBatch, cut
from ringworld_model.config import ModelConfig
from ringworld_model.loss import combine
from ringworld_model.ring import RingContext, RingPlan, choose_backend, plan_rows
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_workers.parity_rows import (
    JobData,
    as_one_document,
    first_rows,
    require_targets,
    restarted_positions,
    shortened,
)
from ringworld_workers.testing import run_distributed

Precision = Literal["fp32", "fp64"]
Cut = Callable[[TrainBatch, Sequence[RingPlan], int], TrainBatch]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp64": torch.float64}
LONGEST_CONTEXT = 4096
"""Tokens of a row where the caller asks for no other cap: minutes, not hours, on a CPU."""
RANKS_TIMEOUT_SECONDS = 3600.0
SMALLEST_SHARE = 1e-6
"""Gradients below this share of the whole norm are held against that share of it: what is zero on
one rank has no relative error."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that pass."""

    loss: float
    grad_norm: float
    gradient: float
    """Of each parameter's gradient: norm of the difference over the norm on one rank."""


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(loss=1e-6, grad_norm=2e-6, gradient=1e-5),
    "fp64": Tolerance(loss=1e-13, grad_norm=1e-13, gradient=1e-12),
}


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """What every rank computes; plain data that travels to the processes.

    Attributes:
        job: name of the job.
        stage: name of the stage.
        model_config: the job's model, with the layers to check.
        seed: of the weights.
        rope_theta: the stage's.
        layout: the stage's ``attention.layout``.
        backend: the block kernel asked for.
        activation_checkpointing: the stage's; the one rank recomputes nothing.
        loss_tile_tokens: the stage's.
        modality_weights: the stage's loss weights of text and vision.
        precision: dtype of weights and activations.
        ring_sizes: rings to check, ascending.
        rows: whole rows by how they are packed: "packed" as the job does, "dense" as one document.
        stage_context_length: tokens of the stage's rows; those here may be shorter.
        notes: what was changed or cannot be seen here, one sentence each.
    """

    job: str
    stage: str
    model_config: ModelConfig
    seed: int
    rope_theta: float
    layout: str
    backend: str
    activation_checkpointing: str
    loss_tile_tokens: int
    modality_weights: tuple[float, float]
    precision: Precision
    ring_sizes: tuple[int, ...]
    rows: dict[str, TrainBatch]
    stage_context_length: int
    notes: tuple[str, ...]

    @property
    def context_length(self) -> int:
        """Tokens of a row."""
        return self.rows["packed"].tokens.shape[1]


@dataclass(frozen=True)
class RingParity:
    """One ring against one rank. Differences are relative; infinite where not a number."""

    packing: str
    ring_size: int
    layout: str
    backend: str
    loss: float
    grad_norm: float
    loss_difference: float
    grad_norm_difference: float
    gradient_errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much."""
        return max(self.gradient_errors.items(), key=lambda item: item[1])

    def passes(self, tolerance: Tolerance) -> bool:
        """Whether every difference is within the tolerance."""
        return (
            self.loss_difference <= tolerance.loss
            and self.grad_norm_difference <= tolerance.grad_norm
            and self.worst[1] <= tolerance.gradient
        )


@dataclass(frozen=True)
class ParityReport:
    """What a check has found."""

    case: ParityCase
    rings: list[RingParity]
    seconds: float

    @property
    def tolerance(self) -> Tolerance:
        """What was asked of every ring."""
        return TOLERANCES[self.case.precision]

    @property
    def passed(self) -> bool:
        """Whether every ring gives what one rank does."""
        return all(ring.passes(self.tolerance) for ring in self.rings)

    def to_json(self) -> dict[str, Any]:
        """Everything, for parity.json; a number that is not finite becomes null."""
        case = self.case
        rings = []
        for ring in self.rings:
            name, error = ring.worst
            judged = {"worst_parameter": name, "worst_error": error}
            rings.append({**asdict(ring), **judged, "passed": ring.passes(self.tolerance)})
        found = {
            "job": case.job,
            "stage": case.stage,
            "passed": self.passed,
            "precision": case.precision,
            "tolerance": asdict(self.tolerance),
            "context_length": case.context_length,
            "stage_context_length": case.stage_context_length,
            "model": asdict(case.model_config),
            "num_parameters": case.model_config.num_parameters(),
            "document_lengths": {k: rows.document_lengths for k, rows in case.rows.items()},
            "notes": case.notes,
            "rings": rings,
            "seconds": self.seconds,
            "time": time.time(),
            "torch": torch.__version__,
        }
        return {key: _finite(value) for key, value in found.items()}


def build_case(
    spec: JobSpec,
    data: JobData,
    *,
    stage_name: str | None = None,
    ring_sizes: Sequence[int] = (1, 2, 4),
    num_layers: int = 2,
    num_rows: int = 1,
    precision: Precision = "fp32",
    context_length: int | None = None,
) -> ParityCase:
    """Take the job's model and its first rows of a stage.

    Args:
        spec: the job.
        data: its prepared data.
        stage_name: the stage; the last one where None, which has the longest rows.
        ring_sizes: rings to check.
        num_layers: layers of the model; those that it has, at most.
        num_rows: rows of the batch.
        precision: dtype of the check.
        context_length: tokens of a row at most; ``LONGEST_CONTEXT`` where None.

    Raises:
        ValueError: no such stage, or an impossible ring size.
        DataError: the data does not fit, or holds no target.
    """
    sizes = tuple(sorted(set(ring_sizes)))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"ring_sizes={list(ring_sizes)}; give sizes of at least 1, such as 1,2,4")
    names = [stage.name for stage in spec.stages]
    if stage_name is not None and stage_name not in names:
        raise ValueError(f"stage {stage_name!r} is unknown; the job has {', '.join(names)}")
    stage = spec.stages[-1 if stage_name is None else names.index(stage_name)]
    config = data.model_config
    notes: list[str] = []
    if num_layers < config.num_layers:
        notes.append(f"the first {num_layers} of {config.num_layers} layers are checked")
        config = replace(config, num_layers=num_layers)
    packed = first_rows(data, stage, spec.seed, num_rows)
    longest = LONGEST_CONTEXT if context_length is None else context_length
    if longest < stage.context_length:
        packed = shortened(packed, longest)
        notes.append(
            f"rows are shortened from {format_tokens(stage.context_length)} to "
            f"{format_tokens(longest)} tokens, each document in proportion"
        )
    require_targets(packed)
    if max(len(lengths) for lengths in packed.document_lengths) < 2:
        notes.append("the packed rows hold one document each; more --rows may show packing")
    backend = stage.attention.backend
    if backend not in ("auto", "cpu", "reference"):
        notes.append(f"attention.backend={backend} needs a GPU; the check takes the CPU's kernel")
        backend = "auto"
    return ParityCase(
        job=spec.name,
        stage=stage.name,
        model_config=config,
        seed=spec.seed,
        rope_theta=stage.rope_theta,
        layout=stage.attention.layout,
        backend=backend,
        activation_checkpointing=stage.memory.activation_checkpointing,
        loss_tile_tokens=stage.loss.tile_tokens,
        modality_weights=(stage.loss.text, stage.loss.vision),
        precision=precision,
        ring_sizes=sizes,
        rows={"packed": packed, "dense": as_one_document(packed)},
        stage_context_length=stage.context_length,
        notes=tuple(notes),
    )


def run_parity(case: ParityCase) -> ParityReport:
    """Start as many processes as the largest ring has ranks, and compare. Ends them all, always.

    Raises:
        DistributedError: a rank failed, with its traceback.
    """
    began = time.monotonic()
    found = run_distributed(compare_rank, case.ring_sizes[-1], case, timeout=RANKS_TIMEOUT_SECONDS)
    return ParityReport(case, found[0], time.monotonic() - began)


def compare_rank(
    rank: int,
    world_size: int,
    case: ParityCase,
    *,
    cut_rows: Cut = cut,
    context: type[RingContext] = RingContext,
) -> list[RingParity]:
    """One rank's part of the check. A collective of the default group: every rank calls it.

    Args:
        rank: in the default group; the first ``ring_size`` ranks make a ring.
        world_size: the largest ring.
        case: what to check.
        cut_rows: gives each rank its share; another one than ``cut`` shows that the check can fail.
        context: computes attention over the ring; likewise.

    Returns:
        A result per packing and ring size on rank 0, nothing elsewhere.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    groups = {
        size: dist.new_group(list(range(size))) if size > 1 else None for size in case.ring_sizes
    }
    backend, _ = choose_backend("cpu", str(DTYPES[case.precision]), case.backend)
    alone = _one_rank(case) if rank == 0 else {}
    model = _model(case, case.activation_checkpointing)
    found: list[RingParity] = []
    for packing, rows in case.rows.items():
        for size, group in groups.items():
            if rank >= size:
                continue
            plans = plan_rows(rows.document_lengths, case.context_length, size, case.layout)
            ring = context(plans=plans, group=group, backend=backend)
            local = cut_rows(rows, plans, rank)
            loss, gradients = _train(case, model, rows, local, ring)
            if group is not None:
                for value in (loss, *gradients.values()):
                    dist.reduce(value, 0, group=group)
            if rank == 0:
                about = (packing, size, plans[0].layout, backend)
                found.append(_compare(about, alone[packing], (loss, gradients)))
    return found


class _OneRank(RingContext):
    """Attention without a ring: torch's causal kernel, one document after another."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        whole = []
        for row, plan in enumerate(self.plans):
            start, parts = 0, []
            for length in plan.document_lengths:
                part = slice(start, start + length)
                start += length
                query, key, value = (
                    tensor[row : row + 1, part].transpose(1, 2) for tensor in (q, k, v)
                )
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
                )
                parts.append(out.transpose(1, 2))
            parts.append(torch.zeros_like(q[row : row + 1, start:]))
            whole.append(torch.cat(parts, 1))
        return torch.cat(whole)


Trained = tuple[torch.Tensor, dict[str, torch.Tensor]]


def _one_rank(case: ParityCase) -> dict[str, Trained]:
    """What one device computes, by packing; it recomputes nothing and derives its own positions."""
    model = _model(case, "none")
    found = {}
    for packing, rows in case.rows.items():
        plans = plan_rows(rows.document_lengths, case.context_length, 1, "contiguous")
        rows = replace(rows, position_ids=restarted_positions(rows))
        found[packing] = _train(case, model, rows, rows, _OneRank(plans=plans, group=None))
    return found


def _model(case: ParityCase, activation_checkpointing: str) -> WorldModel:
    model = WorldModel(
        case.model_config,
        rope_theta=case.rope_theta,
        activation_checkpointing=activation_checkpointing,
        loss_tile_tokens=case.loss_tile_tokens,
    )
    init_weights(model, case.seed)
    return model.to(DTYPES[case.precision])


def _train(
    case: ParityCase, model: WorldModel, rows: TrainBatch, local: TrainBatch, ring: RingContext
) -> Trained:
    """This rank's part of the loss and of every parameter's gradient."""
    weights, vision = rows.loss_weights.double(), rows.target_modality == 1
    total = torch.stack([weights[vision == bool(m)].sum() for m in range(NUM_MODALITIES)])
    loss = combine(model(local, ring), total, case.modality_weights)
    loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def _compare(about: tuple[str, int, str, str], alone: Trained, ring: Trained) -> RingParity:
    norm, ring_norm = _norm(alone[1]), _norm(ring[1])
    errors = {}
    for name, wanted in alone[1].items():
        difference = torch.linalg.vector_norm((ring[1][name] - wanted).double()).item()
        held = max(torch.linalg.vector_norm(wanted.double()).item(), SMALLEST_SHARE * norm)
        errors[name] = _relative(difference, held)
    loss, ring_loss = alone[0].item(), ring[0].item()
    return RingParity(
        *about,
        loss=ring_loss,
        grad_norm=ring_norm,
        loss_difference=_relative(abs(ring_loss - loss), abs(loss)),
        grad_norm_difference=_relative(abs(ring_norm - norm), norm),
        gradient_errors=errors,
    )


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    squares = (torch.linalg.vector_norm(g.double()).item() ** 2 for g in gradients.values())
    return math.sqrt(sum(squares))


def _relative(difference: float, size: float) -> float:
    """difference / size; infinite where it is not a number, so that no comparison lets it pass."""
    if difference == 0:
        return 0.0
    found = difference / size if size else math.inf
    return math.inf if math.isnan(found) else found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
