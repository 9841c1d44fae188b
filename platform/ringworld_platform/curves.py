"""A run's records as arrays over the tokens that it consumed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringworld_jobs.units import format_tokens
from ringworld_platform.run_records import Record, RunRecords

Number = np.float64
Values = np.ndarray[tuple[int], np.dtype[Number]]


@dataclass(frozen=True, slots=True)
class Span:
    """One stage's stretch of the token axis.

    Attributes:
        name: of the stage.
        label: with its context length, where that is known.
        first: tokens consumed before it.
        last: tokens consumed at its end.
        stage_index: its place among the job's stages.
        rope_theta: where the spec is known.
    """

    name: str
    label: str
    first: float
    last: float
    stage_index: int
    rope_theta: float | None = None


@dataclass(frozen=True, slots=True)
class Curves:
    """The step records as arrays over tokens.

    Attributes:
        steps: effective step records, in order.
        tokens: [N] tokens consumed after each step.
        spans: the stages' stretches of the axis.
        validations: validation records, the last one of each stage.
    """

    steps: list[Record]
    tokens: Values
    spans: list[Span]
    validations: dict[int, Record]

    def values(self, name: str) -> Values:
        """[N] one metric, NaN where a step does not have it, or it was no finite number."""
        found = [step.get(name) for step in self.steps]
        return np.array([np.nan if value is None else value for value in found], dtype=Number)

    def part(self, span: Span) -> slice:
        """Positions of a stage's steps."""
        indices = [int(step.get("stage_index", 0)) for step in self.steps]
        first = indices.index(span.stage_index)
        return slice(first, first + indices.count(span.stage_index))

    def by_position(self, modality: str) -> dict[Span, dict[int, float]]:
        """The held-out losses of each stage that has them, by the first position that counts."""
        prefix = f"loss_{modality}_from_"
        found = {}
        for span in self.spans:
            record = self.validations.get(span.stage_index, {})
            starts = (name.removeprefix(prefix) for name in record if name.startswith(prefix))
            losses = {
                start: float(record[f"{prefix}{start}"])
                for start in sorted(map(int, starts))
                if record[f"{prefix}{start}"] is not None
            }
            if losses:
                found[span] = losses
        return found


def curves_of(run: RunRecords) -> Curves:
    """Arrange a run's records for drawing."""
    steps = run.steps()
    tokens = np.array([float(step.get("tokens", i)) for i, step in enumerate(steps)], dtype=Number)
    contexts = {
        int(record["stage_index"]): int(record["context_length"])
        for record in run.of_kind("stage_start")
        if "context_length" in record
    }
    spans: list[Span] = []
    previous = 0.0
    for index in sorted({int(step.get("stage_index", 0)) for step in steps}):
        inside = [i for i, step in enumerate(steps) if int(step.get("stage_index", 0)) == index]
        name = str(steps[inside[0]].get("stage", index))
        label = name
        if index in contexts:
            label = f"{name}: {format_tokens(contexts[index])}"
        last = float(tokens[inside[-1]])
        spec = run.stages[index] if index < len(run.stages) else {}
        theta = spec.get("rope_theta")
        base = float(theta) if theta is not None else None
        spans.append(Span(name, label, previous, last, index, base))
        previous = last
    validations = {
        int(record.get("stage_index", 0)): record for record in run.of_kind("validation")
    }
    return Curves(steps, tokens, spans, validations)


def running_mean(values: Values, window: int) -> Values:
    """Centred mean over ``window`` points, over fewer at the ends; NaN points are left out.

    Args:
        values: [N].
        window: points; made odd.

    Returns:
        [N], NaN only where a whole window is NaN.
    """
    kernel = np.ones(window + 1 - window % 2, dtype=Number)
    present = np.isfinite(values)
    # "full", cut by hand: numpy's "same" returns the kernel's length when it is the longer one.
    half = len(kernel) // 2
    total = np.convolve(np.where(present, values, 0.0), kernel, "full")[half : half + len(values)]
    count = np.convolve(present.astype(Number), kernel, "full")[half : half + len(values)]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)
