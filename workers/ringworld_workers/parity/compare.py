"""One rank and rings on the same rows: loss and every parameter's gradient of both.

The one rank computes attention with torch's own causal kernel, one document at a time: nothing of
the ring (plan, cut, merge, transfer) is in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ringworld_jobs.spec import MemorySpec
from ringworld_model.batch import NUM_MODALITIES, TrainBatch, cut
from ringworld_model.loss import combine
from ringworld_model.ring import RingContext, RingPlan, choose_backend, plan_rows
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_workers.parity.case import DTYPES, ParityCase, Precision, RingShape
from ringworld_workers.parity.report import ParityReport, RingParity, Trained, ring_parity
from ringworld_workers.parity.rows import restarted_positions
from ringworld_workers.testing import run_distributed

Cut = Callable[[TrainBatch, Sequence[RingPlan], int], TrainBatch]

RANKS_TIMEOUT_SECONDS = 3600.0


def run_parity(case: ParityCase) -> ParityReport:
    """Start as many processes as the largest ring has ranks, and compare. Ends them all, always.

    The rings are real processes over gloo, on the CPU.

    Raises:
        DistributedError: a rank failed, with its traceback.
    """
    began = time.monotonic()
    largest = max(shape.size for shape in case.ring_sizes)
    found = run_distributed(compare_rank, largest, case, timeout=RANKS_TIMEOUT_SECONDS)
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
        rank: in the default group; the first ranks make a ring.
        world_size: the largest ring.
        case: what to check.
        cut_rows: gives each rank its share; another one than ``cut`` shows that the check can fail.
        context: computes attention over the ring; likewise.

    Returns:
        A result per packing, precision and ring on rank 0, nothing elsewhere.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    groups = {shape: _groups(shape, rank) for shape in case.ring_sizes}
    device = torch.device("cpu")
    precisions = kernel_precisions(case, device)
    one_rank = OneRank(case, device) if rank == 0 else None
    model = build_model(case, case.memory, device)
    found: list[RingParity] = []
    for packing, rows in case.rows.items():
        for precision in precisions:
            backend = chosen_backend(case, precision, device)
            for shape, (whole, ring_group, heads_group) in groups.items():
                if rank >= shape.size:
                    continue
                plans = plan_rows(
                    rows.document_lengths,
                    case.context_length,
                    shape.ring,
                    case.layout,
                    heads_size=shape.heads,
                    backend=backend,
                )
                more = {} if heads_group is None else {"heads_group": heads_group}
                ring = context(plans=plans, group=ring_group, backend=backend, **more)
                local = cut_rows(rows, plans, rank)
                trained = train_ring(case, model, precision, rows, local, ring, whole)
                if one_rank is not None:
                    found.append(
                        one_rank.judge(packing, precision, trained, plans[0], backend, shape)
                    )
    return found


class OneRank:
    """What one device computes of each packing; it recomputes nothing and counts its positions."""

    def __init__(self, case: ParityCase, device: torch.device) -> None:
        """Compute the truth, and in bf16 what one rank makes of it in that precision."""
        self._case = case
        self._found: dict[tuple[str, Precision], Trained] = {}
        truth: Precision = "fp64" if case.precision == "fp64" else "fp32"
        self._truth = truth
        model = build_model(case, MemorySpec(), device)
        for packing, rows in case.rows.items():
            plans = plan_rows(rows.document_lengths, case.context_length, 1, "contiguous")
            rows = replace(rows, position_ids=restarted_positions(rows)).to(device)
            ring = _OneRank(plans=plans, group=None)
            for precision in dict.fromkeys((truth, case.precision)):
                found = _train(case, model.to(DTYPES[precision]), rows, rows, ring)
                self._found[packing, precision] = found

    def judge(
        self,
        packing: str,
        precision: Precision,
        found: Trained,
        plan: RingPlan,
        backend: str,
        shape: RingShape,
        ring: int = 0,
    ) -> RingParity:
        """Hold a ring's loss and gradients against this rank's."""
        one_rank = None if precision != "bf16" else self._found[packing, precision]
        return ring_parity(
            found,
            self._found[packing, self._truth],
            one_rank,
            packing=packing,
            precision=precision,
            ring_size=shape.ring,
            heads_size=shape.heads,
            layout=plan.layout,
            why=plan.explain(),
            backend=backend,
            ring=ring,
        )


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


def kernel_precisions(case: ParityCase, device: torch.device) -> tuple[Precision, ...]:
    """The precisions to check: the case's, and fp32 beside bf16 where the kernel takes it.

    Raises:
        ValueError: no kernel runs the case's own precision here.
    """
    chosen_backend(case, case.precision, device)
    if case.precision != "bf16":
        return (case.precision,)
    try:
        chosen_backend(case, "fp32", device)
    except ValueError:
        return ("bf16",)
    return ("fp32", "bf16")


def build_model(case: ParityCase, memory: MemorySpec, device: torch.device) -> WorldModel:
    """The case's model in its initial weights; those of a bf16 case are numbers of bf16."""
    # The layers draw weights of their own before ours: training's generator stays where it was.
    with torch.random.fork_rng(devices=[]):
        model = WorldModel(
            case.model_config,
            rope_theta=case.rope_theta,
            activation_checkpointing=memory.activation_checkpointing,
            activation_offload=memory.activation_offload,
            mlp_tile_tokens=memory.mlp_tile_tokens,
            loss_tile_tokens=case.loss_tile_tokens,
        )
        init_weights(model, case.seed)
    return model.to(device, DTYPES[case.precision])


def train_ring(
    case: ParityCase,
    model: WorldModel,
    precision: Precision,
    rows: TrainBatch,
    local: TrainBatch,
    ring: RingContext,
    group: dist.ProcessGroup | None,
) -> Trained:
    """Loss and gradients of a whole ring, on its first rank. A collective of the ring.

    Args:
        case: what is checked.
        model: of ``build_model``; it is left in ``precision``.
        precision: what to compute in.
        rows: the whole rows.
        local: this rank's share of them, on the model's device.
        ring: computes attention.
        group: all ranks that share the rows; None where there is one.
    """
    loss, gradients = _train(case, model.to(DTYPES[precision]), rows, local, ring)
    if group is not None:
        # Added up in fp32 or better: what the engine's own sum costs is no matter of the ring.
        exact = torch.promote_types(DTYPES[precision], torch.float32)
        loss, gradients = loss.to(exact), {n: g.to(exact) for n, g in gradients.items()}
        for value in (loss, *gradients.values()):
            dist.reduce(value, group=group, group_dst=0)
    return loss, gradients


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


def chosen_backend(case: ParityCase, precision: Precision, device: torch.device) -> str:
    """The kernel that computes a precision of the case.

    Raises:
        ValueError: none does here.
    """
    dtype = str(DTYPES[precision])
    return choose_backend(device.type, dtype, case.backend, case.model_config.head_dim)[0]


def _groups(shape: RingShape, rank: int) -> tuple[Any, Any, Any]:
    """This rank's groups in a ring of the default group's first ranks; every rank calls it.

    Returns:
        All ranks of the ring, those of the same part of each place, and those of this rank's place.
    """
    if shape.size == 1:
        return None, None, None
    whole = dist.new_group(list(range(shape.size)))
    if shape.heads == 1:
        return whole, whole, None
    columns = [list(range(part, shape.size, shape.heads)) for part in range(shape.heads)]
    places = [list(range(at, at + shape.heads)) for at in range(0, shape.size, shape.heads)]
    rings = [dist.new_group(ranks) if len(ranks) > 1 else None for ranks in columns]
    heads = [dist.new_group(ranks) for ranks in places]
    if rank >= shape.size:
        return whole, None, None
    return whole, rings[rank % shape.heads], heads[rank // shape.heads]
