"""What a parity check has found, and whether it passes.

In fp32 and fp64 a ring is held against one rank in the same precision, with an absolute limit. In
bf16 neither of the two is the truth: both are held against one rank in fp32 with the same weights,
and the ring may be off by so many times as one rank is.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ringworld_workers.parity.case import ParityCase, Precision
from ringworld_workers.strict_json import finite

SMALLEST_SHARE = 1e-6
"""Gradients below this share of the whole norm are held against that share of it: what is zero on
one rank has no relative error."""

Trained = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A loss, and every parameter's gradient by name."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that pass.

    Attributes:
        loss: of the loss.
        grad_norm: of the norm over all parameters.
        gradient: of each parameter's gradient: norm of the difference over the norm of the truth.
        times_one_rank: allowed on top of each, in errors of one rank of the same precision.
    """

    loss: float
    grad_norm: float
    gradient: float
    times_one_rank: float = 0.0


TOLERANCES: dict[Precision, Tolerance] = {
    # 2 ** -9 is what rounding a gradient to bf16 once may cost.
    "bf16": Tolerance(loss=2**-11, grad_norm=2**-8, gradient=2**-9, times_one_rank=1.5),
    "fp32": Tolerance(loss=1e-6, grad_norm=2e-6, gradient=1e-5),
    "fp64": Tolerance(loss=1e-13, grad_norm=1e-13, gradient=1e-12),
}


@dataclass(frozen=True)
class Errors:
    """How far a computation is from the truth; relative, infinite where it is not a number."""

    loss: float
    grad_norm: float
    gradients: dict[str, float]

    @classmethod
    def of(cls, found: Trained, truth: Trained) -> Errors:
        """Compare loss and gradients with those of the truth."""
        norm = _norm(truth[1])
        gradients = {}
        for name, wanted in truth[1].items():
            difference = torch.linalg.vector_norm(found[1][name].double() - wanted.double()).item()
            held = max(torch.linalg.vector_norm(wanted.double()).item(), SMALLEST_SHARE * norm)
            gradients[name] = _relative(difference, held)
        loss, true_loss = found[0].item(), truth[0].item()
        return cls(
            _relative(abs(loss - true_loss), abs(true_loss)),
            _relative(abs(_norm(found[1]) - norm), norm),
            gradients,
        )


@dataclass(frozen=True)
class RingParity:
    """One ring against one rank.

    Attributes:
        packing: of the rows: packed or dense.
        ring_size: places of the ring.
        layout: which tokens each rank holds, as chosen.
        backend: the kernel, as chosen.
        loss: of the ring.
        grad_norm: of the ring.
        loss_difference: relative; infinite where it is not a number, as the next two.
        grad_norm_difference: relative.
        gradient_errors: by parameter: norm of the difference over the norm of the truth.
        precision: of weights and activations.
        heads_size: ranks of each place.
        why: why this layout.
        ring: which of the stage's rings, counted from 0; the same number everywhere else.
        one_rank: in bf16, how far one rank is from the truth.
    """

    packing: str
    ring_size: int
    layout: str
    backend: str
    loss: float
    grad_norm: float
    loss_difference: float
    grad_norm_difference: float
    gradient_errors: dict[str, float]
    precision: Precision = "fp32"
    heads_size: int = 1
    why: str = ""
    ring: int = 0
    one_rank: Errors | None = None

    @property
    def shape(self) -> str:
        """Ring size, or ring and heads sizes: 4, 2x2."""
        return str(self.ring_size) + (f"x{self.heads_size}" if self.heads_size > 1 else "")

    @property
    def tolerance(self) -> Tolerance:
        """What is asked of a ring of this precision."""
        return TOLERANCES[self.precision]

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient is farthest beyond, or nearest to, its limit; its error."""
        name, error = max(self.gradient_errors.items(), key=lambda e: e[1] / self.limit(e[0]))
        return name, error

    @property
    def excess(self) -> float:
        """The largest of all differences, in units of its limit; above 1 fails."""
        name, error = self.worst
        return max(
            error / self.limit(name),
            self.loss_difference / self.loss_limit,
            self.grad_norm_difference / self.grad_norm_limit,
        )

    @property
    def passed(self) -> bool:
        """Whether every difference is within its limit."""
        return self.excess <= 1

    @property
    def loss_limit(self) -> float:
        """Largest difference of the loss that passes."""
        return self._limit(self.tolerance.loss, self.one_rank.loss if self.one_rank else 0.0)

    @property
    def grad_norm_limit(self) -> float:
        """Largest difference of the gradient norm that passes."""
        one_rank = self.one_rank.grad_norm if self.one_rank else 0.0
        return self._limit(self.tolerance.grad_norm, one_rank)

    def limit(self, parameter: str) -> float:
        """Largest error of a parameter's gradient that passes."""
        one_rank = self.one_rank.gradients[parameter] if self.one_rank else 0.0
        return self._limit(self.tolerance.gradient, one_rank)

    def _limit(self, least: float, one_rank: float) -> float:
        # Where one rank itself is no number, nothing passes.
        allowed = self.tolerance.times_one_rank * one_rank if math.isfinite(one_rank) else 0.0
        return least + allowed

    def sentence(self) -> str:
        """The finding in words: the worst parameter, its error and limit, and the loss."""
        name, error = self.worst
        return (
            f"{self.packing} rows, {self.precision}, ring {self.shape} in {self.layout} layout on "
            f"the {self.backend} kernel: the gradient of {name} is off by {error:.1e} "
            f"({self.limit(name):.1e} is allowed), the loss by {self.loss_difference:.1e} "
            f"({self.loss_limit:.1e})"
        )


@dataclass(frozen=True)
class ParityReport:
    """What a check has found."""

    case: ParityCase
    rings: list[RingParity]
    seconds: float

    @property
    def tolerance(self) -> Tolerance:
        """What was asked of every ring in the case's precision."""
        return TOLERANCES[self.case.precision]

    @property
    def passed(self) -> bool:
        """Whether every ring gives what one rank does."""
        return all(ring.passed for ring in self.rings)

    @property
    def worst(self) -> RingParity:
        """The ring that is farthest beyond, or nearest to, its limit."""
        return max(self.rings, key=lambda ring: ring.excess)

    def to_json(self) -> dict[str, Any]:
        """Everything, for parity.json; a number that is not finite becomes null."""
        case = self.case
        rings = []
        for ring in self.rings:
            name, error = ring.worst
            judged = {
                "worst_parameter": name,
                "worst_error": error,
                "worst_limit": ring.limit(name),
                "passed": ring.passed,
            }
            rings.append({**asdict(ring), **judged})
        found = {
            "job": case.job,
            "stage": case.stage,
            "passed": self.passed,
            "precision": case.precision,
            "tolerance": asdict(self.tolerance),
            "context_length": case.context_length,
            "stage_context_length": case.stage_context_length,
            "model": asdict(case.model_config),
            "num_parameters": case.model_config.num_parameters(),
            "document_lengths": {k: rows.document_lengths for k, rows in case.rows.items()},
            "notes": case.notes,
            "rings": rings,
            "seconds": self.seconds,
            "time": time.time(),
            "torch": torch.__version__,
        }
        return {key: finite(value) for key, value in found.items()}


def ring_parity(
    found: Trained, truth: Trained, one_rank: Trained | None, **about: Any
) -> RingParity:
    """Hold what a ring has computed against the truth.

    Args:
        found: the ring's loss and gradients, of all its ranks together.
        truth: one rank's, in fp32 or better.
        one_rank: one rank's in the ring's precision, where that is not the truth's.
        **about: the other fields of ``RingParity``.
    """
    errors = Errors.of(found, truth)
    return RingParity(
        loss=found[0].item(),
        grad_norm=_norm(found[1]),
        loss_difference=errors.loss,
        grad_norm_difference=errors.grad_norm,
        gradient_errors=errors.gradients,
        one_rank=None if one_rank is None else Errors.of(one_rank, truth),
        **about,
    )


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    squares = (torch.linalg.vector_norm(g.double()).item() ** 2 for g in gradients.values())
    return math.sqrt(sum(squares))


def _relative(difference: float, size: float) -> float:
    """difference / size; infinite where it is not a number, so that no comparison lets it pass."""
    if difference == 0:
        return 0.0
    found = difference / size if size else math.inf
    return math.inf if math.isnan(found) else found
