"""What a step's attention cost on every rank of the gang: compute, exposed waiting, bytes sent."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable

import torch

from ringworld_model.ring import RingStats

log = logging.getLogger(__name__)

FIGURES = 3
LOG_SECONDS = 10.0
"""Between two lines of a rank's log: the metric log has every step."""


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


class RingLog:
    """Writes a rank's own figures into its log now and then, the first step's at once."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self._written = -math.inf

    def step(self, step: int, figures: torch.Tensor) -> None:
        """Take a step's figures.

        Args:
            step: counted from 1.
            figures: of this rank, [3], a row of ``ring_figures``.
        """
        if time.monotonic() - self._written < LOG_SECONDS:
            return
        self._written = time.monotonic()
        compute, wait, sent = figures.tolist()
        log.info(
            "step %d: ring compute %.3f s, exposed wait %.3f s, %.1f MiB sent",
            step,
            compute,
            wait,
            sent / 2**20,
        )
