"""Whether a step's numbers are sound: none that is not finite, none that jumps.

Every rank judges the same all-reduced numbers, so all of them come to the same end without a word.
They are on the host already: nothing here waits for a device.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ringworld_jobs.spec import RecoverySpec
from ringworld_workers.checkpoint.layout import StateNotFinite

HISTORY_STEPS = 32
"""Steps before the one that diverged whose numbers are kept as evidence."""
NORMAL_DEVIATION = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
LEAST_DEVIATION = {"grad_norm": 0.25}
"""Share of the median that a deviation has at least: runs that have settled are quiet, and a
gradient norm is never as quiet as a loss."""
LEAST_LOSS_DEVIATION = 0.02

_SOUND = "the newest committed checkpoint is sound: lower learning_rate.peak, or leave the rows out"

FindingKind = Literal["nan", "spike"]
Action = Literal["warn", "rollback", "stop"]


class TrainingDiverged(RuntimeError):
    """Training must not go on from here; the newest committed checkpoint is sound.

    Attributes:
        facts: plain data for the controller: ``kind``, ``step``, ``action``, and ``skip_steps``,
            the steps whose rows a rollback leaves out (counted from 1, as in the metric log).
    """

    def __init__(self, text: str, facts: Mapping[str, Any] | None = None) -> None:
        """Say what diverged where, and what to do about it."""
        super().__init__(text)
        self.facts = dict(facts or {})


@dataclass(frozen=True)
class Finding:
    """A number that is not sound.

    Attributes:
        kind: not finite, or a jump.
        name: of the number, as in the metric log.
        value: what it is.
        usual: median of the window; None where the number is not finite.
        limit: what it may be at most.
        action: what the spec wants.
        skip_steps: how many steps a rollback leaves out, up to this one.
    """

    kind: FindingKind
    name: str
    value: float
    usual: float | None = None
    limit: float | None = None
    action: Action = "stop"
    skip_steps: int = 1

    def __str__(self) -> str:
        """In words."""
        if self.kind == "nan":
            return f"{self.name} is {self.value}"
        return (
            f"{self.name} jumped to {self.value:.6g}, from {self.usual:.6g} lately (limit "
            f"{self.limit:.6g})"
        )


class NumericGuard:
    """Judges one step after another."""

    def __init__(self, recovery: RecoverySpec) -> None:
        """Know of no step yet: a resumed run learns anew what is usual."""
        self._recovery, self._spike = recovery, recovery.loss_spike
        self._windows: dict[str, deque[float]] = {}
        self._limits: dict[str, float] = {}
        """Of the numbers that are above what was usual before they jumped."""
        self.history: deque[dict[str, float]] = deque(maxlen=HISTORY_STEPS)
        """Numbers of the newest steps, the one judged last included."""

    def judge(self, step: int, numbers: Mapping[str, float]) -> Finding | None:
        """What is not sound among a step's numbers, the worst of it.

        A jump is told once: not again before the number has come down.

        Args:
            step: that is done, counted from 1.
            numbers: losses by name, and the global gradient norm.
        """
        self.history.append({"step": step, **numbers})
        for name, value in numbers.items():
            if not math.isfinite(value):
                return Finding("nan", name, value, action=self._recovery.on_nan)
        if self._spike.action == "off":
            return None
        found = None
        for name, value in numbers.items():
            # The mixed loss jumps wherever a step has no row of a modality.
            if name.startswith("loss_") or name == "grad_norm":
                jump = self._jump(name, value)
                found = found or jump
        return found

    def over(self) -> set[str]:
        """Numbers whose jump has ended with the step judged last; each is told once."""
        now = self.history[-1] if self.history else {}
        ended = {name for name, limit in self._limits.items() if now.get(name, limit + 1) <= limit}
        for name in ended:
            del self._limits[name]
        return ended

    def _jump(self, name: str, value: float) -> Finding | None:
        window = self._windows.setdefault(name, deque(maxlen=self._spike.window))
        above = self._above(name, value, window)
        window.append(value)
        if above is None or name in self._limits:
            return None
        usual, limit = above
        self._limits[name] = limit
        action = self._spike.action
        return Finding(
            "spike",
            name,
            value,
            usual,
            limit,
            "warn" if action == "off" else action,
            self._spike.skip_steps,
        )

    def _above(self, name: str, value: float, window: deque[float]) -> tuple[float, float] | None:
        """Median and limit, if the value is above it; None also while too few steps are known."""
        if len(window) < self._spike.window // 4:
            return None
        usual = statistics.median(window)
        spread = statistics.median(abs(other - usual) for other in window)
        least = LEAST_DEVIATION.get(name, LEAST_LOSS_DEVIATION) * abs(usual)
        limit = usual + self._spike.factor * max(NORMAL_DEVIATION * spread, least)
        return (usual, limit) if value > limit else None


def refuse_nonsense(
    numbers: Mapping[str, float], stage: str, step: int, recovery: RecoverySpec
) -> None:
    """Stop when the score of a stage's end is not finite; all ranks hold the same one.

    Args:
        numbers: by name.
        stage: whose end it is.
        step: its last one.
        recovery: says whether to go back.

    Raises:
        TrainingDiverged: says which number.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"{name} is {value} at step {step} of stage {stage}, on held-out rows; {_SOUND}",
                {"kind": "nan", "action": recovery.on_nan, "step": step, "skip_steps": [step]},
            )


def refuse_state(error: StateNotFinite, stage: str, recovery: RecoverySpec) -> TrainingDiverged:
    """What to raise on every rank when a snapshot holds NaN or Inf: its last step made them.

    Args:
        error: names step and tensor.
        stage: that was to be saved.
        recovery: says whether to go back.
    """
    return TrainingDiverged(
        f"the state after step {error.step} of stage {stage} is no longer sound: {error}; {_SOUND}",
        {
            "kind": "nan",
            "action": recovery.on_nan,
            "step": error.step,
            "skip_steps": [error.step],
        },
    )
