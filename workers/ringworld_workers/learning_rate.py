"""The learning rate of one step: linear warm-up, then constant or cosine."""

from __future__ import annotations

import math

from ringworld_jobs.spec import LearningRateSpec


def learning_rate_at(spec: LearningRateSpec, step: int, num_steps: int) -> float:
    """The rate that optimizer step ``step`` uses.

    Args:
        spec: peak, schedule and warm-up of the stage.
        step: step within the stage, from 0.
        num_steps: steps of the stage; a cosine reaches ``spec.final`` at the last of them.

    Returns:
        The learning rate. The first step of a warm-up has ``peak / warmup_steps``, not zero, so
        that no step is wasted.
    """
    if step < spec.warmup_steps:
        return spec.peak * (step + 1) / spec.warmup_steps
    if spec.schedule == "constant":
        return spec.peak
    span = max(1, num_steps - 1 - spec.warmup_steps)
    progress = min(1.0, (step - spec.warmup_steps) / span)
    return spec.final + (spec.peak - spec.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
