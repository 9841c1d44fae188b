"""What a training says of itself on the way; read where there is no torch, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Update:
    """How far a training is.

    Attributes:
        phase: what is being done.
        step: steps done.
        share: of the whole training that lies behind, 0..1.
        metrics: newest value of each figure, as in ``metrics.jsonl``.
        result: at the end, what ``result.json`` holds; None before, and when it was stopped.
    """

    phase: str
    step: int
    share: float
    metrics: dict[str, float]
    result: dict[str, Any] | None = None
