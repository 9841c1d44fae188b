"""Which rank computes much longer than its peers. Pure: no Ray, no clock.

Steps of a gang last equally long on all ranks, since they wait for each other. What tells a slow
one is the time that it computes, its waits left out. A rank is slow when that is, in the middle of
the last ten steps, twice as long as the middle of the others, beyond what the layout of the rows
gives it to do, and costs a tenth of a step; it has recovered below one and a half times.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

STEPS_SEEN = 10
SLOW, RECOVERED = 2.0, 1.5
LEAST_SHARE = 0.1
"""Of a step: below it, even a rank that is much slower costs little."""


@dataclass(frozen=True, slots=True)
class Change:
    """A rank has become slow, or is no longer.

    Attributes:
        rank: which.
        ratio: its time to compute to the others'; None once it keeps up again.
    """

    rank: int
    ratio: float | None


class SlowRanks:
    """The ranks of one gang.

    Attributes:
        ratios: of the ranks that are slow at present.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._steps: deque[tuple[Sequence[float], float, float]] = deque(maxlen=STEPS_SEEN)
        self.ratios: dict[int, float] = {}

    def step(
        self, compute_seconds: Sequence[float], step_seconds: float, imbalance: float = 1.0
    ) -> list[Change]:
        """Take a step's figures.

        Args:
            compute_seconds: of each rank, waits for others left out.
            step_seconds: of the whole step.
            imbalance: the most that the layout gives a rank to do, to the mean.

        Returns:
            What has changed with it: each episode is told when it begins and when it ends.
        """
        if len(compute_seconds) < 2:
            return []
        self._steps.append((compute_seconds, step_seconds, imbalance))
        if len(self._steps) < STEPS_SEEN:
            return []
        middles = [median(each) for each in zip(*(s[0] for s in self._steps), strict=True)]
        step_middle = median(s[1] for s in self._steps)
        share = max(s[2] for s in self._steps)
        ordered = sorted(middles)
        changes = []
        for rank, own in enumerate(middles):
            others = share * _median_without(ordered, own)
            ratio = own / others if others > 0 else 1.0
            costly = own - others >= LEAST_SHARE * step_middle
            if rank in self.ratios:
                if ratio < RECOVERED or not costly:
                    del self.ratios[rank]
                    changes.append(Change(rank, None))
                else:
                    self.ratios[rank] = ratio
            elif ratio >= SLOW and costly:
                self.ratios[rank] = ratio
                changes.append(Change(rank, ratio))
        return changes


def _median_without(ordered: Sequence[float], one: float) -> float:
    """The median of sorted values without one of them: a thousand ranks ask a thousand times."""
    at = bisect_left(ordered, one)

    def value(index: int) -> float:
        return ordered[index if index < at else index + 1]

    left = len(ordered) - 1
    return (value((left - 1) // 2) + value(left // 2)) / 2
