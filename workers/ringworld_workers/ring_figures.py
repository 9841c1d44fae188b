"""What a step's attention cost on every rank of the gang: compute, exposed waiting, bytes sent."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ringworld_model.ring import RingStats

FIGURES = 3


def ring_figures(stats: Iterable[RingStats], rank: int, world_size: int) -> torch.Tensor:
    """This rank's figures at its place among all ranks'; add the tensors up over the ranks.

    Args:
        stats: of each micro-batch, forward and backward together.
        rank: this rank.
        world_size: number of ranks.

    Returns:
        float64 [world_size, 3]: compute seconds, wait seconds, bytes sent. Zero in other rows.
    """
    found = torch.zeros(world_size, FIGURES, dtype=torch.float64)
    for each in stats:
        spent = (each.compute_seconds, each.wait_seconds, float(each.bytes_sent))
        found[rank] += torch.tensor(spent, dtype=torch.float64)
    return found


def ring_record(figures: torch.Tensor) -> dict[str, float | list[float]]:
    """A step's ring figures for the metric log.

    Args:
        figures: of all ranks, [world_size, 3] as ``ring_figures`` gives them.

    Returns:
        The mean over the ranks and the most of any; ``ring_slowest_rank`` computed longest, so that
        its peers wait for it. ``ring_compute_by_rank`` is for whoever watches the gang, and no part
        of the log.
    """
    compute, wait, sent = figures.mean(0).tolist()
    most = figures.max(0).values.tolist()
    return {
        "ring_compute_seconds": compute,
        "ring_compute_max_seconds": most[0],
        "ring_wait_seconds": wait,
        "ring_wait_max_seconds": most[1],
        "ring_bytes_sent": sent,
        "ring_bytes_sent_max": most[2],
        "ring_slowest_rank": int(figures[:, 0].argmax()),
        "ring_compute_by_rank": [round(seconds, 6) for seconds in figures[:, 0].tolist()],
    }
