"""Checks before the first transfer, so that bad input is an error on every rank, never a hang."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ringworld_model.ring.plan import RingPlan

_MESSAGE_BYTES = 1024


def check_kinds(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: RingPlan | Sequence[RingPlan],
    softmax_scale: float | None,
) -> None:
    """Refuse arguments of another kind altogether, on which ``check_inputs`` would stumble.

    Args:
        q: should be a tensor of four dimensions.
        k: likewise.
        v: likewise, of k's shape.
        plan: should be a plan, or a sequence of them.
        softmax_scale: should be a finite int or float, or None.

    Raises:
        ValueError: what is of the wrong kind.
    """
    if not all(isinstance(tensor, torch.Tensor) for tensor in (q, k, v)):
        kinds = ", ".join(type(tensor).__name__ for tensor in (q, k, v))
        raise ValueError(f"q, k, v are of type {kinds}; give three tensors")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be [B, T, H, D] and k, v the same [B, T, Hkv, D]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    plans = [plan] if isinstance(plan, RingPlan) else plan
    if not isinstance(plans, Sequence) or not all(isinstance(each, RingPlan) for each in plans):
        raise ValueError(
            f"plan is {str(plan)[:40]!r}; give what plan_ring returns, or a list of one a row"
        )
    if softmax_scale is not None and not (
        isinstance(softmax_scale, int | float) and math.isfinite(softmax_scale)
    ):
        raise ValueError(f"softmax_scale={softmax_scale!r} must be a finite int or float, or None")


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plans: Sequence[RingPlan]
) -> None:
    """Refuse tensors and plans that do not fit together on this rank.

    Args:
        q: should be [B, T, H, D], as all in ``ring_attention``.
        k: should be [B, T, Hkv, D].
        v: should be [B, T, Hkv, D].
        plans: one a row.

    Raises:
        ValueError: what does not fit, with the remedy.
    """
    if q.numel() == 0 or k.numel() == 0:
        raise ValueError(
            f"q {tuple(q.shape)} or k {tuple(k.shape)} is empty; every rank brings at least one "
            "row, token, head and channel, padding included"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} need equal B, T and D, and H must be a "
            "multiple of Hkv"
        )
    if not q.layout == k.layout == v.layout == torch.strided:
        raise ValueError(
            f"q, k, v are {q.layout}, {k.layout}, {v.layout}; make them dense with to_dense()"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k, v are on {q.device}, {k.device}, {v.device}; move them to one device"
        )
    if not plans or len(plans) != q.shape[0]:
        raise ValueError(f"{len(plans)} plans for {q.shape[0]} rows; give one plan a row")
    if len({(plan.ring_size, plan.heads_size, plan.local_length) for plan in plans}) != 1:
        raise ValueError(
            "the rows' plans differ in ring_size, heads_size or local_length; plan all rows of a "
            "batch with the same context_length, ring_size, heads_size and layout"
        )
    if plans[0].local_length != q.shape[1]:
        raise ValueError(
            f"q holds {q.shape[1]} tokens a row, but the plan's local_length is "
            f"{plans[0].local_length}; cut the row by plan.local_indices"
        )


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plans: Sequence[RingPlan],
    backend: str,
    scale: float,
) -> str:
    """What must be the same on every rank of a ring, in words."""
    # A rank that skips the backward pass would leave the others waiting in theirs.
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    return (
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, {q.dtype} on {q.device.type}, backend {backend}, "
        f"softmax_scale {scale}, {'with' if backward else 'without'} gradients, "
        f"{plans[0].layout} plans {' '.join(dict.fromkeys(plan.digest for plan in plans))} "
        f"({zlib.crc32(' '.join(plan.digest for plan in plans).encode()):08x})"
    )


def waits_for_device(*groups: dist.ProcessGroup | None) -> bool:
    """Whether the host waits for its device where ``agree`` asks these groups."""
    return any(group is not None and dist.get_backend(group) == "nccl" for group in groups)


def agree(
    group: dist.ProcessGroup | None,
    heads_group: dist.ProcessGroup | None,
    problem: str | None,
    terms: str,
) -> None:
    """Go on only where every rank of both groups found its inputs right, and all found the same.

    One small exchange a group; a second one, of the words, only where there is an error to tell.
    What the ranks of one ring place found goes around the ring, so that every rank hears of it.

    Args:
        group: the ring; None: one rank, which agrees with itself.
        heads_group: the ranks of this ring place, likewise.
        problem: why this rank's inputs are refused, or None.
        terms: what this rank is about to do, see ``describe``.

    Raises:
        ValueError: on every rank; names the ranks and their reasons.
    """
    crossing = [("heads", heads_group, group), ("ring", group, heads_group)]
    for name, members, others in crossing:
        if members is not None:
            # Groups that do not cross at right angles would wait for each other.
            at = dist.get_rank(others) if others is not None else 0
            problem = _problem_of(members, name, problem, f"{terms}, column {at}")
    if problem is not None:
        raise ValueError(problem)


def _problem_of(group: dist.ProcessGroup, name: str, problem: str | None, terms: str) -> str | None:
    """Why the ranks of one group cannot go on, the same words on each of them; None if they can."""
    # Where the group takes tensors, not where the inputs are: they may be on the wrong device.
    where = torch.cuda.current_device() if waits_for_device(group) else "cpu"
    words = terms if problem is None else problem
    mine = torch.tensor([problem is not None, zlib.crc32(words.encode())], device=where)
    flags = torch.stack(_gathered(mine, group)).tolist()
    if not any(refused for refused, _ in flags) and all(flag == flags[0] for flag in flags):
        return None
    text = words.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(where)
    said = [
        bytes(part.tolist()).decode(errors="replace").strip() for part in _gathered(mine, group)
    ]
    refused = [rank for rank, flag in enumerate(flags) if flag[0]]
    if len(refused) == len(flags) and len(set(said)) == 1:
        return said[0]
    if refused:
        reasons = "; ".join(f"{name} rank {rank}: {said[rank]}" for rank in refused)
        return f"ring attention refused on {len(refused)} of {len(flags)} ranks: {reasons}"
    different = "; ".join(f"{name} rank {rank}: {words}" for rank, words in enumerate(said))
    return (
        f"the ranks of the {name} group call ring_attention with different inputs; give all the "
        f"same rows, plans, dtype and backend: {different}"
    )


def _gathered(mine: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return parts
