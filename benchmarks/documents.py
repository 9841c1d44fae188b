"""Documents of the rows that the ring benchmarks are run on; the same ones each time."""

from __future__ import annotations

import random


def documents_of(kind: str, length: int) -> list[int]:
    """Lengths: "dense" one, "short" about 910 tokens each, "long tail" about 6,000."""
    if kind == "dense":
        return [length]
    rng = random.Random(1)
    if kind == "short":
        num = max(2, round(length * 72 / 65536))
        cuts = sorted(rng.sample(range(1, length), num - 1))
    else:
        num = max(2, round(length * 11 / 65536))
        weights = [rng.paretovariate(1.0) for _ in range(num)]
        sums = [sum(weights[: at + 1]) for at in range(num - 1)]
        cuts = [max(at + 1, int(length * part / sum(weights))) for at, part in enumerate(sums)]
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
