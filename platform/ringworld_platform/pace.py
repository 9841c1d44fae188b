"""How long a gang may go without a sign of progress, learnt from the pace of its steps. No clock.

While a rank is inside a step, the limit follows the steps: ten times the longest of the last 20,
and never below 30 s nor above 30 min. Before the second step is done there is no pace yet: what
the planner expects of a step takes its place. What goes on between steps (saving, loading,
validation, waiting for data) keeps none. In both cases the limit is 300 s at least.
``recovery.stall_timeout`` replaces all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

FACTOR = 10
STEPS_SEEN = 20
FLOOR_SECONDS = 30.0
START_SECONDS = 300.0
CEILING_SECONDS = 1800.0
COLLECTIVE_FACTOR = 2.0
LEAST_COLLECTIVE_SECONDS = 60.0
STEP_PHASES = frozenset({"boundary", "forward", "backward", "optimizer"})
"""What lasts no longer than a step does."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Longest time without progress of any rank.

    Attributes:
        seconds: the limit.
        why: where it comes from, for the user.
    """

    seconds: float
    why: str


class Pace:
    """What is known of one gang's steps."""

    def __init__(self, stall_timeout: float | None = None) -> None:
        """Know nothing yet.

        Args:
            stall_timeout: the spec's limit in seconds; None derives it from the steps.
        """
        self._fixed = stall_timeout
        self._seconds: deque[float] = deque(maxlen=STEPS_SEEN)
        self._begun = False
        self._expected = 0.0

    @property
    def collective_seconds(self) -> float:
        """After which a collective fails by itself.

        Later than any limit, so that the watch can name the culprit first; and late enough for
        ranks that start or load one after the other on a busy machine.
        """
        most = CEILING_SECONDS if self._fixed is None else self._fixed
        return max(COLLECTIVE_FACTOR * most, LEAST_COLLECTIVE_SECONDS)

    def expect(self, seconds: float) -> None:
        """A step is foretold to take so long."""
        self._expected = seconds

    def step(self, seconds: float) -> None:
        """A step is done that has taken so long, the wait for a checkpoint left out."""
        if self._begun:
            self._seconds.append(seconds)
        # The first step of a gang warms up: it says little of the others.
        self._begun = True

    def limit(self, phases: Collection[str]) -> Limit:
        """The limit while the ranks are in these phases; the most patient of them counts."""
        if self._fixed is not None:
            return Limit(self._fixed, "recovery.stall_timeout")
        if not self._seconds:
            foretold = min(CEILING_SECONDS, FACTOR * self._expected)
            if foretold > START_SECONDS:
                return Limit(foretold, f"{FACTOR} x what a step is expected to take")
            return Limit(START_SECONDS, "the limit until two steps are done")
        steps = self._step_limit()
        if all(phase in STEP_PHASES for phase in phases) or steps.seconds >= START_SECONDS:
            return steps
        slow = sorted(phase for phase in phases if phase not in STEP_PHASES)
        return Limit(START_SECONDS, f"the limit in {slow[0]}")

    def _step_limit(self) -> Limit:
        seconds = FACTOR * max(self._seconds)
        number = len(self._seconds)
        last = f"longest of the last {number} steps" if number > 1 else "last step"
        why = f"{FACTOR} x the {last}"
        if seconds < FLOOR_SECONDS:
            return Limit(FLOOR_SECONDS, f"{why}, at least {FLOOR_SECONDS:g} s")
        if seconds > CEILING_SECONDS:
            return Limit(CEILING_SECONDS, f"{why}, at most {CEILING_SECONDS:g} s")
        return Limit(seconds, why)
