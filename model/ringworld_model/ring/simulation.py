"""A whole ring in one process: its ranks one after another, and nothing sent.

For checks of a kernel or a plan at any ring size, without processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ringworld_model.ring.kernel import RingKernel, accumulator, group_rows
from ringworld_model.ring.plan import RingPlan


def simulate(
    plan: RingPlan | Sequence[RingPlan],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    kernel: RingKernel,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of whole rows and its gradients, as the ranks of a ring compute them.

    What a rank is not sent, or may not read, is NaN here, and so is padding past the rows'
    documents.

    Args:
        plan: one plan for all rows, or one for each.
        q: [B, S, H, D], S the plan's context_length.
        k: [B, S, Hkv, D].
        v: [B, S, Hkv, D].
        grad_out: [B, S, H, D], the gradient of out.
        kernel: computes each rank's part.
        softmax_scale: factor of the scores; D ** -0.5 where None.

    Returns:
        out, dq, dk, dv of the shapes of q, q, k, v; out and dq in q's dtype, dk and dv summed over
        the ranks in fp32 (fp64 for fp64 inputs).
    """
    plans = [plan] * len(q) if isinstance(plan, RingPlan) else list(plan)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    rows, size, length = group_rows(plans), plans[0].ring_size, plans[0].ring_length
    # The ranks of a place have exchanged their tokens; the heads do not matter to each other.
    ranks = range(size * plans[0].heads_size)
    held = torch.stack([torch.cat([of.local_indices(rank) for rank in ranks]) for of in plans])
    held = held.to(q.device)  # [B, size * length]
    every = torch.arange(len(plans), device=q.device)[:, None]

    def spread(whole: torch.Tensor) -> list[torch.Tensor]:
        room = whole.new_full((len(whole), size * length, *whole.shape[2:]), torch.nan)
        for row, of in enumerate(plans):
            real = sum(of.document_lengths)
            room[row, :real] = whole[row, :real]
        return list(room[every, held].split(length, 1))

    def given(rank: int, step: int) -> list[torch.Tensor]:
        """K and V of a step: what has travelled, and of that what the plan names."""
        source, found = (rank - step) % size, []
        for local in (all_k[source], all_v[source]):
            found.append(torch.full_like(local, torch.nan))
            for part, of in rows:
                named = {(one.k0, one.k1) for one in of.rectangles(rank, step)}
                travelled = torch.full_like(local[part], torch.nan) if step else local[part]
                if step:
                    _copy(local[part], travelled, of.travel(rank).keys_in[step])
                _copy(travelled, found[-1][part], named)
        return found

    all_q, all_k, all_v, all_grad = (spread(whole) for whole in (q, k, v, grad_out))
    exact = accumulator(q.dtype)
    outs, dqs = [], []
    shares = [torch.zeros((2, *local.shape), dtype=exact, device=q.device) for local in all_k]
    for rank in range(size):
        forward = kernel.forward(rank, rows, all_q[rank], scale)
        for step in range(size):
            forward.step(step, *given(rank, step))
        out, lse = forward.finish()
        out = out.to(q.dtype)
        backward = kernel.backward(rank, rows, all_grad[rank], all_q[rank], out, lse, scale)
        for step in range(size):
            keys, values = given(rank, step)
            backward.step(step, keys, values, *shares[(rank - step) % size].unbind(0))
        outs.append(out)
        dqs.append(backward.finish().to(q.dtype))
    order = held.argsort()[:, : q.shape[1]]
    dks, dvs = zip(*shares, strict=True)
    out, dq, dk, dv = (torch.cat(list(parts), 1)[every, order] for parts in (outs, dqs, dks, dvs))
    return out, dq, dk, dv


def _copy(source: torch.Tensor, target: torch.Tensor, spans: Iterable[tuple[int, int]]) -> None:
    for start, stop in spans:
        target[:, start:stop] = source[:, start:stop]
