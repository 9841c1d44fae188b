"""Who starts next, who makes way, and what the others wait for. Pure: no Ray, no clock, no threads.

The line is in order of priority, then of submission. Each run in it is served in turn:

- It starts where its whole gang fits into what is free, never a part of it.
- Else it may preempt: the last in the line's order of those that hold workers and have a lower
  priority, as few as it takes, and only if that makes room. Runs that end or make way already count
  as gone.
- Else it waits, and a run behind it may start only on what it cannot use: where it would still
  find room if all that are ahead of it were gone, and all that are behind it stayed for ever.

So a waiting run waits for those ahead of it, and for those behind it that held their workers before
it came; never for one that was let past. Among runs of one priority nobody starves. A lower
priority waits for as long as higher ones keep coming: that is what priorities are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ringworld_platform.room import Bundle, Places, Room, Rooms, count, place, take

_NO_GROWTH: Rooms = {}
_IMPOSSIBLE = (
    ", so that it will never start on these: add nodes, or shrink the stage's mesh or "
    "resources.cpus_per_worker"
)
LOOK_PAST = 50
"""Runs that are looked at for a start behind one that waits. More would be slow and gain little."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A run that wants workers.

    Attributes:
        run_id: which run.
        priority: higher goes first.
        submitted: seconds since the epoch; earlier goes first among equals.
        size: workers, all at once.
        bundle: resources of each.
        ready: it could start now. A run between two gangs is not: the room that it had is kept.
        places: where it was to start, or has run before; taken again if possible.
    """

    run_id: str
    priority: int
    submitted: float
    size: int
    bundle: Bundle
    ready: bool = True
    places: Places = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, float, str]:
        """Sorts who goes first to the front."""
        return -self.priority, self.submitted, self.run_id


@dataclass(frozen=True, slots=True)
class Holding:
    """A run that has its workers.

    Attributes:
        run_id: which run.
        priority: see ``Demand``.
        submitted: see ``Demand``.
        bundle: resources of each worker.
        places: where they are.
        leaving: it is saving in order to stop or to make way.
        eta_seconds: how long it will still run, if known.
    """

    run_id: str
    priority: int
    submitted: float
    bundle: Bundle
    places: Places
    leaving: bool = False
    eta_seconds: float | None = None

    @property
    def order(self) -> tuple[int, float, str]:
        """As ``Demand.order``."""
        return -self.priority, self.submitted, self.run_id


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a run does not start.

    Attributes:
        place: its place in the line, from 1.
        reason: what is missing, in one line.
        possible: False if no nodes that are there, or could come, can hold it.
        room: workers of its kind that all nodes together hold.
        start_seconds: estimate of the wait, where the runs that it waits for know their time left.
        new_nodes: how many nodes an autoscaler is to add for it; 0 where that is not known, None
            where it is not asked for any.
    """

    place: int
    reason: str
    possible: bool = True
    room: int = 0
    start_seconds: float | None = None
    new_nodes: int | None = None


@dataclass(slots=True)
class Plan:
    """What is to happen now.

    Attributes:
        starts: nodes of each run that starts.
        kept: nodes that will be free for a run that waits.
        asks: runs that wait for nodes which an autoscaler may add, and for how many; 0: unknown.
        yields: runs that make way, and for whom.
        waits: every other run in the line.
    """

    starts: dict[str, Places] = field(default_factory=dict)
    kept: dict[str, Places] = field(default_factory=dict)
    asks: dict[str, int] = field(default_factory=dict)
    yields: dict[str, str] = field(default_factory=dict)
    waits: dict[str, Wait] = field(default_factory=dict)


def decide(
    nodes: Rooms,
    demands: Sequence[Demand],
    holdings: Sequence[Holding],
    growth: Rooms | None = _NO_GROWTH,
) -> Plan:
    """Decide for everyone at once.

    Args:
        nodes: all that the nodes have for gangs, held or not.
        demands: the line, in any order.
        holdings: the runs that have workers.
        growth: nodes that an autoscaler could add; where they help, nobody has to make way. None:
            some, it is not known which; then one run at a time asks for them, and only where nobody
            makes way for it. Empty: the nodes are all that there will be.
    """
    return _Decision(nodes, demands, holdings, growth).plan


@dataclass(slots=True)
class _Blocked:
    """A run that waits for others to end.

    Attributes:
        demand: the run.
        left: the nodes without what those behind it hold, or were let past it to take.
    """

    demand: Demand
    left: dict[str, Room]

    def gains(self, left: dict[str, Room], holding: Holding) -> None:
        """A run that was taken to stay goes: if it is behind this one, its room is left too."""
        if holding.order > self.demand.order:
            _give(left, holding.bundle, holding.places)


class _Decision:
    """One pass over the line."""

    def __init__(
        self,
        nodes: Rooms,
        demands: Sequence[Demand],
        holdings: Sequence[Holding],
        growth: Rooms | None,
    ) -> None:
        self.plan = Plan()
        self._nodes, self._growth = nodes, dict(growth or {})
        self._kinds = [*nodes.values(), *self._growth.values()]
        self._may_ask = growth is None
        self._staying = sorted((h for h in holdings if not h.leaving), key=lambda h: h.order)
        self._leaving = [h for h in holdings if h.leaving]
        self._free = dict(nodes)
        for holding in holdings:
            take(self._free, holding.bundle, holding.places)
        # What is free once the leaving have left, without what they leave for somebody.
        self._soon = dict(self._free)
        for holding in self._leaving:
            _give(self._soon, holding.bundle, holding.places)
        self._blocked: list[_Blocked] = []
        self._ahead: list[str] = []
        self._looked_past = 0
        line = sorted(demands, key=lambda d: d.order)
        for place_in_line, demand in enumerate(line, start=1):
            reason = self._serve(demand)
            if reason is not None:
                room = count(demand.bundle, nodes.values())
                asks = self.plan.asks.get(demand.run_id)
                possible = room >= demand.size or asks is not None
                self.plan.waits[demand.run_id] = Wait(
                    place_in_line, reason, possible, room, new_nodes=asks
                )
        self._estimate([d for d in line if d.run_id in self.plan.waits])

    def _serve(self, demand: Demand) -> str | None:
        """Start a run if it may; else say what is missing."""
        if self._blocked:
            self._looked_past += 1
        may_pass = self._looked_past <= LOOK_PAST
        now = {node: room.at_most(self._soon[node]) for node, room in self._free.items()}
        found = self._find(demand, now) if may_pass else None
        if not demand.ready:
            if found is None or found != demand.places:
                return "its room is gone"
            take(self._free, demand.bundle, found)
            self._reserve(demand, found)
            return "its room is kept until it goes on"
        if found is not None:
            take(self._free, demand.bundle, found)
            self._reserve(demand, found)
            self.plan.starts[demand.run_id] = found
            return None
        missing = self._missing(demand)
        if not may_pass:
            return missing
        if self._grow(demand, now):
            return missing
        if place(demand.size, demand.bundle, self._nodes) is None:
            return missing if self._ask(demand) else missing + _IMPOSSIBLE
        self._ahead.append(demand.run_id)
        found, victims = self._make_room(demand)
        if found is None:
            self._block(demand)
            self._ask(demand)
            return missing
        for victim in victims:
            self.plan.yields[victim.run_id] = demand.run_id
            self._staying.remove(victim)
            self._leaving.append(victim)
            _give(self._soon, victim.bundle, victim.places)
            for blocked in self._blocked:
                blocked.gains(blocked.left, victim)
        self._reserve(demand, found)
        self.plan.kept[demand.run_id] = found
        going = [h.run_id for h in self._leaving if any(node in found for node in h.places)]
        return f"{missing}; {', '.join(going[:3])} makes way" if going else missing

    def _find(self, demand: Demand, rooms: Rooms, going: Sequence[Holding] = ()) -> Places | None:
        """Places that no run ahead needs, once these have gone."""
        found = place(demand.size, demand.bundle, rooms, demand.places)
        if found is None:
            return None
        for blocked in self._blocked:
            left = dict(blocked.left)
            for holding in going:
                blocked.gains(left, holding)
            take(left, demand.bundle, found)
            if place(blocked.demand.size, blocked.demand.bundle, left) is None:
                return None
        return found

    def _reserve(self, demand: Demand, found: Places) -> None:
        """Nobody behind this run may have its places, and it stays in the way of none ahead."""
        take(self._soon, demand.bundle, found)
        for blocked in self._blocked:
            take(blocked.left, demand.bundle, found)

    def _grow(self, demand: Demand, now: Rooms) -> bool:
        """Let it wait for nodes that are known to be possible."""
        if not self._growth:
            return False
        found = self._find(demand, {**now, **self._growth})
        if found is None:
            return False
        self.plan.asks[demand.run_id] = sum(node in self._growth for node in found)
        take(self._growth, demand.bundle, found)
        take(self._free, demand.bundle, found)
        self._reserve(demand, found)
        return True

    def _ask(self, demand: Demand) -> bool:
        """Let it wait for nodes that may be possible."""
        if not self._may_ask:
            return False
        self._may_ask = False
        self.plan.asks[demand.run_id] = 0
        return True

    def _make_room(self, demand: Demand) -> tuple[Places | None, list[Holding]]:
        """Places that come free when those that leave have left, and who else must leave."""
        found = self._find(demand, self._soon)
        if found is not None:
            return found, []
        chosen: list[Holding] = []
        for holding in reversed(self._staying):
            if holding.priority >= demand.priority:
                return None, []
            chosen.append(holding)
            if self._find(demand, self._without(chosen), chosen) is not None:
                break
        else:
            return None, []
        # Taken from the line's end, some may be of no help: the first in line is spared first.
        for holding in reversed(chosen[:]):
            fewer = [other for other in chosen if other is not holding]
            if self._find(demand, self._without(fewer), fewer) is not None:
                chosen = fewer
        return self._find(demand, self._without(chosen), chosen), chosen

    def _without(self, holdings: Sequence[Holding]) -> Rooms:
        rooms = dict(self._soon)
        for holding in holdings:
            _give(rooms, holding.bundle, holding.places)
        return rooms

    def _block(self, demand: Demand) -> None:
        left = dict(self._nodes)
        for holding in self._staying:
            if holding.order > demand.order:
                take(left, holding.bundle, holding.places)
        self._blocked.append(_Blocked(demand, left))

    def _missing(self, demand: Demand) -> str:
        """What stands between a run and its start."""
        bundle = demand.bundle
        parts = [f"needs {bundle.named(demand.size)}"]
        what = "node type" if len(self._kinds) > len(self._nodes) else "node"
        parts.append(f"the largest {what} has {self._largest(bundle)}")
        total = count(bundle, self._nodes.values())
        free = count(bundle, self._free.values())
        if total < demand.size:
            parts.append(f"all nodes together hold {total}")
        else:
            parts.append(f"{free} of {total} {'is' if free == 1 else 'are'} free")
        if self._ahead:
            more = f" and {len(self._ahead) - 1} more" if len(self._ahead) > 1 else ""
            parts.append(f"behind {self._ahead[0]}{more}")
        return "; ".join(parts)

    def _largest(self, bundle: Bundle) -> str:
        """What the node has, there or possible, that holds the most of these bundles."""
        if not bundle.gpus:
            return _counted(max((kind.cpus for kind in self._kinds), default=0), "CPU")
        most = max(self._kinds, key=lambda r: (bundle.count_in(r), r.gpus, r.cpus), default=Room())
        gpus, cpus = _counted(most.gpus, "GPU"), _counted(most.cpus, "CPU")
        # A node may have GPUs enough, and too few CPUs to feed them.
        return f"{gpus} and {cpus}" if most.cpus < bundle.cpus * most.gpus else gpus

    def _estimate(self, waiting: Sequence[Demand]) -> None:
        """When each would start, if nobody came and nobody were let past."""
        rooms = dict(self._free)
        for holding in self._leaving:
            _give(rooms, holding.bundle, holding.places)
        known = [h for h in self._staying if h.eta_seconds is not None]
        ends = sorted(known, key=lambda h: h.eta_seconds or 0.0)
        moment = 0.0
        for demand in waiting:
            wait = self.plan.waits[demand.run_id]
            if wait.room < demand.size:
                continue
            while (found := place(demand.size, demand.bundle, rooms, demand.places)) is None:
                if not ends:
                    return
                first = ends.pop(0)
                moment = first.eta_seconds or 0.0
                _give(rooms, first.bundle, first.places)
            take(rooms, demand.bundle, found)
            self.plan.waits[demand.run_id] = replace(wait, start_seconds=moment)


def _give(rooms: dict[str, Room], bundle: Bundle, places: Places) -> None:
    for node, number in places.items():
        if node in rooms:
            rooms[node] = rooms[node].plus(bundle, number)


def _counted(number: float, what: str) -> str:
    return f"{number:g} {what}{'s' * (number != 1)}"
