"""When nodes are asked for a stage that is yet to come, and how many. Pure: no Ray, no clock.

Nodes take a while to start. Those that the next stage wants beyond what its run has now are asked
for while the stage before it still trains, so long before its end as nodes took to come lately.

Ray's autoscaler knows one such request for the whole cluster, and it is about the cluster's size,
not about what is free. So it is one for all runs: what the gangs hold that stay, and what the
stages want that come. It is all or nothing, too: were a part of it above the limits of the node
types, no node would come, so that what cannot come is left out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ringworld_platform.room import Bundle, Places, Room, Rooms, count, place, take
from ringworld_platform.scheduler import Holding

FIRST_GUESS_SECONDS = 120.0
"""What nodes are expected to take before any have come: rather too long than too short."""
STARTS_SEEN = 5
LONGEST_SECONDS = 1800.0
"""Nodes that took longer were waited for in vain for most of the time."""
MARGIN_SECONDS = 2.0
"""On top of what nodes took: how late the autoscaler and we look."""
STEPS_SEEN = 20
EARLIER = 2.0
"""A stage that turns out to begin later than so many leads is asked for too early."""


@dataclass(frozen=True, slots=True)
class Coming:
    """A run's next stage.

    Attributes:
        run_id: which run.
        order: its place in the line, as ``Demand.order``.
        sizes: workers that it may run on, the wanted number first; all more than the run has now.
        bundle: resources of each.
        left_seconds: until it begins; below zero: it should have begun.
        lead_seconds: so long before it begins it is asked for.
        asked: whether it is in the present request.
    """

    run_id: str
    order: tuple[int, float, str]
    sizes: tuple[int, ...]
    bundle: Bundle
    left_seconds: float
    lead_seconds: float
    asked: bool = False

    @property
    def due(self) -> bool:
        """Whether its nodes are to be there or on their way.

        One that is overdue by as much as it was asked for early is asked for no longer: its
        estimate was wrong, and nodes would idle. Once it waits in the line it asks for itself.
        """
        # An estimate that moves a little must not call back the nodes that it called.
        earliest = self.lead_seconds * (EARLIER if self.asked else 1.0)
        return -self.lead_seconds <= self.left_seconds <= earliest


@dataclass(frozen=True, slots=True)
class Request:
    """What Ray's autoscaler is to hold.

    Attributes:
        bundles: how many of each kind; nothing: no request.
        runs: those whose next stage is in it, and the workers of that.
        new_nodes: nodes of it that are not there yet; None: some, it is not known how many.
    """

    bundles: Mapping[Bundle, int]
    runs: Mapping[str, int]
    new_nodes: int | None = 0


NOTHING = Request({}, {})


def plan_request(
    comings: Iterable[Coming],
    holdings: Mapping[str, Holding],
    nodes: Rooms,
    growth: Rooms | None,
) -> Request:
    """Decide what to ask for.

    Args:
        comings: stages that will want more workers than their runs have.
        holdings: what gangs hold now, by run.
        nodes: all that the nodes have, held or not.
        growth: nodes that an autoscaler may still add; None: it is not known which.

    Returns:
        The request; ``NOTHING`` where nothing is due.
    """
    due = sorted((coming for coming in comings if coming.due), key=lambda coming: coming.order)
    there, more = dict(nodes), dict(growth or {})
    bundles: Counter[Bundle] = Counter()
    for holding in holdings.values():
        take(there, holding.bundle, holding.places)
        bundles[holding.bundle] += sum(holding.places.values())
    runs: dict[str, int] = {}
    added: set[str] = set()
    unknown = False
    for coming in due:
        has = holdings.get(coming.run_id)
        # Its next gang takes what it has now, and this beside it.
        kept = sum(has.places.values()) if has is not None else 0
        for size in coming.sizes:
            new = _find(size - kept, coming.bundle, there, more)
            if new is None and growth is not None:
                continue
            unknown = unknown or new is None
            added.update(new or ())
            bundles[coming.bundle] += size - kept
            runs[coming.run_id] = size
            break
    if not runs:
        return NOTHING
    return Request(bundles, runs, None if unknown else len(added))


def _find(
    size: int, bundle: Bundle, there: dict[str, Room], more: dict[str, Room]
) -> Places | None:
    """Take room for a gang, on nodes that are there as far as possible.

    Returns:
        What it takes of the nodes that may come; None, and nothing taken, where it finds no room.
    """
    fits = min(size, count(bundle, there.values()))
    old = (place(fits, bundle, there) or {}) if fits else {}
    new = place(size - fits, bundle, more) if fits < size else {}
    if new is None:
        return None
    take(there, bundle, old)
    take(more, bundle, new)
    return new


class StartTimes:
    """How long nodes took to come, in this controller's life."""

    def __init__(self) -> None:
        """None have come yet."""
        self._seen: deque[float] = deque(maxlen=STARTS_SEEN)

    def add(self, seconds: float) -> None:
        """Nodes have come, so long after they were asked for."""
        self._seen.append(min(seconds, LONGEST_SECONDS))

    @property
    def expected_seconds(self) -> float:
        """How long before they are needed nodes are asked for."""
        return max(self._seen, default=FIRST_GUESS_SECONDS) + MARGIN_SECONDS


class EvaluationPace:
    """When the evaluations of a stage will end, from how long those of the stage before took."""

    def __init__(self) -> None:
        """None was seen yet; they are taken to take no time."""
        self._of: int | None = None
        self._began = 0.0
        self.expected_seconds = 0.0
        """How long those of a stage take."""

    def see(self, of: int | None, now: float) -> None:
        """Look at a run.

        Args:
            of: the stage that is being evaluated, in whatever attempt; None: none is.
            now: monotonic seconds.
        """
        if of == self._of:
            return
        if self._of is not None:
            self.expected_seconds = now - self._began
        self._of, self._began = of, now

    @property
    def end(self) -> float:
        """When those at hand are expected to be done, in monotonic seconds."""
        return self._began + self.expected_seconds


class StagePace:
    """When a stage will end, from when its steps were seen; what comes between them counts too."""

    def __init__(self) -> None:
        """No step was seen yet."""
        self._of: object = None
        self._seen: deque[tuple[int, float]] = deque(maxlen=STEPS_SEEN)

    def see(self, of: object, step: int, now: float) -> None:
        """Look at a run.

        Args:
            of: which stage and attempt it is at; another one begins anew.
            step: the last step that is done.
            now: monotonic seconds.
        """
        if of != self._of:
            self._of = of
            self._seen.clear()
        if not self._seen or step > self._seen[-1][0]:
            self._seen.append((step, now))

    def end(self, num_steps: int) -> float | None:
        """When the last of so many steps is expected to be done; None before two steps."""
        # What was seen first may be the step that the stage began at, long done.
        steps = list(self._seen)[1:]
        if len(steps) < 2:
            return None
        (first, began), (last, seen) = steps[0], steps[-1]
        return seen + (num_steps - last) * (seen - began) / (last - first)
