"""The ring plan: what every rank computes at every ring step, made once a row on the host."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, SupportsIndex

import torch

from ringworld_model.ring.cost import BACKENDS, DEALT, bound_cost, bound_dealt, by_step, count_cost
from ringworld_model.ring.layout import LAYOUTS, build_layout
from ringworld_model.ring.rectangle import Rectangles
from ringworld_model.ring.travel import Travel, plan_travel
from ringworld_model.ring.work import Work, count_work

# How "auto" weighs costs, which are estimates, and balance, which is counted: an imbalance up to
# the first is as good as none, 5 % more outweigh double the cost, and nothing outweighs more
# than the last.
_BALANCED = Fraction(112, 100)
_WEIGHT = 16
_NEAR = Fraction(3, 2)


@dataclass(frozen=True)
class RingPlan:
    """Who holds which tokens of one row, and who computes what when. See ``plan_ring``.

    The row is cut over ring_size places of heads_size ranks each. The ranks of a place hold the
    neighbouring parts of its tokens; for attention they exchange them, so that each works on all
    ring_length tokens of the place with 1 / heads_size of the heads. So ``local_length`` and
    ``local_indices`` are about ranks, 0 to ring_size * heads_size - 1, and rank r is at place
    r // heads_size; all else (``ring_length``, ``rectangles``, ``travel``, ``pairs``) is about
    places. With heads_size 1 there is no difference.

    At ring step s, place p works on the keys and values of place (p - s) mod ring_size. Two plans
    are equal when they are for the same documents, lengths, sizes and layout.

    Attributes:
        document_lengths: tokens of each document; they follow one another from index 0.
        context_length: tokens of the whole row.
        ring_size: number of places.
        heads_size: ranks of a place.
        layout: the layout's name, never "auto".
        local_length: tokens that each rank holds, padding included; the same on every rank.
        digest: 16 hex digits that differ between plans that are not equal.
        pairs: visible pairs, int64 [ring_size, ring_size], by (place, step). Do not write to it.
        cache: room for tables that kernels derive from the plan, under keys of their own.
    """

    document_lengths: tuple[int, ...]
    context_length: int
    ring_size: int
    heads_size: int
    layout: str
    local_length: int
    digest: str = field(compare=False, repr=False)
    pairs: torch.Tensor = field(compare=False, repr=False)
    _work: Work = field(compare=False, repr=False)
    _reason: str = field(compare=False, repr=False)
    _rectangles: dict[int, list[Rectangles]] = field(
        compare=False, repr=False, default_factory=dict
    )
    _travels: dict[int, Travel] = field(compare=False, repr=False, default_factory=dict)
    cache: dict[Any, Any] = field(compare=False, repr=False, default_factory=dict)

    @property
    def ring_length(self) -> int:
        """Tokens that the ranks of a place hold together: local_length * heads_size."""
        return self.local_length * self.heads_size

    def local_indices(self, rank: int) -> torch.Tensor:
        """Row index of each local token of ``rank``, 0 to ring_size * heads_size - 1.

        Returns:
            int64 [local_length], ascending. Indices from ``context_length`` on are padding; so
            are those past the documents' sum, where the row itself is padded.

        Raises:
            ValueError: no such rank.
        """
        ranks = self.ring_size * self.heads_size
        if not 0 <= rank < ranks:
            raise ValueError(
                f"rank={rank} is outside the {ranks} ranks ({self.ring_size} places of "
                f"{self.heads_size})"
            )
        place, part = divmod(rank, self.heads_size)
        return self._work.layout.local_indices(place)[
            part * self.local_length : (part + 1) * self.local_length
        ]

    def explain(self) -> str:
        """One sentence: which layout was taken, and what the others would have cost."""
        return f"{self.layout}: {self._reason}"

    def rectangles(self, rank: int, step: int) -> Rectangles:
        """What ``rank`` computes at ring step ``step``: each visible pair in exactly one of them.

        Those of all the rank's steps are made when first asked for.

        Args:
            rank: a place in the ring.
            step: ring step.

        Raises:
            ValueError: no such place or step.
        """
        source = (self._check("rank", rank) - self._check("step", step)) % self.ring_size
        if rank not in self._rectangles:
            self._rectangles[rank] = self._work.rectangles(rank)
        return self._rectangles[rank][source]

    def travel(self, rank: int) -> Travel:
        """What ``rank`` sends and receives; K/V that no later rank needs are not sent on.

        Made when first asked for.

        Args:
            rank: a place in the ring.

        Raises:
            ValueError: no such place.
        """
        if self._check("rank", rank) not in self._travels:
            self._travels[rank] = plan_travel(self._work.layout, self.document_lengths, rank)
        return self._travels[rank]

    @property
    def imbalance(self) -> float:
        """Slowest rank's visible pairs over the mean rank's, summed over the steps; 1 is ideal."""
        return float(_imbalance([self.pairs]))

    @property
    def step_imbalance(self) -> tuple[float, ...]:
        """Slowest rank's visible pairs over the mean rank's, by step; 1 where there is no work."""
        slowest, total = self.pairs.max(0).values.tolist(), self.pairs.sum(0).tolist()
        return tuple(
            most * self.ring_size / every if every else 1.0
            for most, every in zip(slowest, total, strict=True)
        )

    def _check(self, name: str, value: int) -> int:
        if not 0 <= value < self.ring_size:
            raise ValueError(f"{name}={value} is outside the ring of {self.ring_size}")
        return value


def plan_ring(
    document_lengths: Sequence[int],
    context_length: int,
    ring_size: int,
    layout: str = "auto",
    *,
    heads_size: int = 1,
    backend: str = "auto",
) -> RingPlan:
    """Plan attention over one row: causal within each document, nothing across documents.

    A function of its arguments alone, so that all ranks agree without a message; cached.

    Args:
        document_lengths: tokens of each document of the row, in order, each at least 1. Their sum
            may be less than context_length: the rest of the row is padding.
        context_length: tokens of the whole row, any number from 1.
        ring_size: number of places in the ring, any number from 1.
        layout: "block_cyclic", "contiguous", "zigzag", "document_zigzag", "striped", or "auto".
            It counts what each layout costs (when the last rank is done, masked waste, calls, rows
            that travel, padding), leaves out those that cost over 1.5 times the least, and takes
            the cheapest whose imbalance is at most 1.12; above that, cost and imbalance are
            weighed.
        heads_size: ranks of each place, that share its heads; any number from 1.
        backend: the backend whose cost "auto" counts; nothing else depends on it. "auto": as for
            "cpu", but without document_zigzag, for which a kernel of tiles may pay twice.

    Raises:
        ValueError: an impossible length or size, or an unknown layout.
    """
    return plan_rows(
        [document_lengths],
        context_length,
        ring_size,
        layout,
        heads_size=heads_size,
        backend=backend,
    )[0]


def plan_rows(
    document_lengths: Sequence[Sequence[int]],
    context_length: int,
    ring_size: int,
    layout: str = "auto",
    *,
    heads_size: int = 1,
    backend: str = "auto",
) -> list[RingPlan]:
    """Plan the rows of one batch: as ``plan_ring`` does, with one layout for all rows.

    "auto" compares costs and imbalance over all rows, so that local_length is the same too.

    Args:
        document_lengths: of each row, see ``plan_ring``.
        context_length: tokens of each whole row.
        ring_size: number of places.
        layout: see ``plan_ring``.
        heads_size: ranks of each place.
        backend: see ``plan_ring``.

    Raises:
        ValueError: see ``plan_ring``.
    """
    context_length = _whole("context_length", context_length)
    ring_size, heads_size = _whole("ring_size", ring_size), _whole("heads_size", heads_size)
    if context_length < 1 or ring_size < 1 or heads_size < 1:
        raise ValueError(
            f"context_length={context_length}, ring_size={ring_size} and heads_size={heads_size} "
            "must be at least 1"
        )
    rows = [_lengths(row, lengths) for row, lengths in enumerate(document_lengths)]
    for row, lengths in enumerate(rows):
        if any(length < 1 for length in lengths):
            at = next(at for at, length in enumerate(lengths) if length < 1)
            raise ValueError(
                f"row {row}: document_lengths[{at}]={lengths[at]} is below 1; leave it out"
            )
        if sum(lengths) > context_length:
            raise ValueError(
                f"row {row}: document_lengths sum to {sum(lengths)}, more than "
                f"context_length={context_length}"
            )
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if layout == "auto":
        return list(_choose(tuple(rows), context_length, ring_size, heads_size, backend))
    return [_plan(row, context_length, ring_size, heads_size, layout) for row in rows]


def _lengths(row: int, lengths: Sequence[int]) -> tuple[int, ...]:
    try:
        each = tuple(lengths)
    except TypeError:
        raise ValueError(f"document_lengths: {lengths!r} is no list; give [{lengths!r}]") from None
    return tuple(
        _whole(f"row {row}: document_lengths[{at}]", length) if type(length) is not int else length
        for at, length in enumerate(each)
    )


def _whole(name: str, value: SupportsIndex) -> int:
    """The value as an int: of NumPy and torch too, but nothing that would have to be rounded."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r} is not a whole number; give an int") from None


# Plans keep the tables that kernels make of them, on a GPU some 24 bytes a token of the row: few.
@lru_cache(maxsize=16)
def _choose(
    rows: tuple[tuple[int, ...], ...],
    context_length: int,
    ring_size: int,
    heads_size: int,
    backend: str,
) -> tuple[RingPlan, ...]:
    """Plans of the layout that "auto" takes, see ``plan_ring``; counts no more than it must."""

    def plans(name: str) -> list[RingPlan]:
        return [_plan(row, context_length, ring_size, heads_size, name) for row in rows]

    def bound(name: str) -> int:
        if name in DEALT:
            return sum(bound_dealt(name, row, context_length, ring_size, backend) for row in rows)
        return sum(bound_cost(plan._work, backend) for plan in plans(name))

    # A kernel of tiles may pay twice for what suits rectangles; who names no backend may have one.
    layouts = [name for name in LAYOUTS if backend != "auto" or name != "document_zigzag"]
    bounds = {name: bound(name) for name in layouts}
    costs: dict[str, int] = {}
    imbalances = {
        name: _imbalance([plan.pairs for plan in plans(name)])
        for name in layouts
        if name not in DEALT
    }
    weighed: dict[str, Fraction] = {}
    # Those last of which counting the cost of thousands of documents takes longer than all else.
    for name in sorted(layouts, key=lambda name: (name in DEALT, bounds[name])):
        # Nothing is weighed as less than it costs: what costs more than the best can not win.
        most = min((_NEAR * min(costs.values()), *weighed.values())) if costs else None
        if most is not None and bounds[name] <= most and name in DEALT:
            closer = sum(bound_cost(plan._work, backend) for plan in plans(name))
            bounds[name] = max(bounds[name], closer)
        if most is not None and bounds[name] > most:
            continue
        costs[name] = sum(count_cost(plan._work, backend) for plan in plans(name))
        imbalances[name] = _imbalance([plan.pairs for plan in plans(name)])
        above = max(Fraction(1), imbalances[name] / _BALANCED)
        weighed[name] = costs[name] * above**_WEIGHT
    near = [name for name in costs if costs[name] <= _NEAR * min(costs.values())]
    best = min((name for name in layouts if name in near), key=weighed.__getitem__)
    unit = max(1, costs[best])

    def compared(name: str) -> str:
        cost = "" if name in costs else "at least "
        cost += f"{costs.get(name, bounds[name]) / unit:.2f}"
        known = f" (imbalance {float(imbalances[name]):.2f})" if name in imbalances else ""
        return f"{name} {cost}{known}"

    others = ", ".join(
        compared(name)
        for name in sorted(layouts, key=lambda name: costs.get(name, bounds[name]))
        if name != best
    )
    if imbalances[best] <= _BALANCED:
        why = "the least counted cost of a balanced layout"
    else:
        why = "the best of counted cost and imbalance"
    reason = (
        f"{why}, with backend {backend} at ring size {ring_size} ({unit / 1e6:.3g}M pairs a rank, "
        f"imbalance {float(imbalances[best]):.2f}); as multiples of it: {others}"
    )
    return tuple(replace(plan, _reason=reason) for plan in plans(best))


def _imbalance(pairs: Sequence[torch.Tensor]) -> Fraction:
    """Slowest rank over the mean, summed over rows and steps, of tables by (place, step)."""
    total = sum(int(table.sum()) for table in pairs)
    slowest = sum(int(table.max(0).values.sum()) for table in pairs)
    # Exact, so that every machine takes the same layout.
    return Fraction(slowest * len(pairs[0]), total) if total else Fraction(1)


@lru_cache(maxsize=32)
def _plan(
    lengths: tuple[int, ...], context_length: int, ring_size: int, heads_size: int, name: str
) -> RingPlan:
    layout = build_layout(name, lengths, context_length, ring_size, heads_size)
    work = count_work(layout, lengths)
    identity = repr((lengths, context_length, ring_size, heads_size, name))
    return RingPlan(
        document_lengths=lengths,
        context_length=context_length,
        ring_size=ring_size,
        heads_size=heads_size,
        layout=name,
        local_length=layout.length // heads_size,
        digest=hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
        pairs=by_step(work.pairs),
        _work=work,
        _reason="asked for by name, not compared with other layouts",
    )
