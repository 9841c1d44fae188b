"""The line of runs that want workers, and those that have them: what runners talk to.

Each runner's thread asks again several times a second; the plan is made by whichever comes first
after something has changed, for all of them. What the plan rests on is mostly known here, as every
gang is started by it. Ray's own count of what is free lags behind by a moment: it serves to see
what others use, once it has stood for a while.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce

from ringworld_platform.capacity import Cluster
from ringworld_platform.rhythm import Rhythm
from ringworld_platform.room import Bundle, Places, Room, count
from ringworld_platform.scheduler import Demand, Holding, Plan, Wait, decide

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""The nodes are not asked for more often."""
PLAN_SECONDS = 1.0
"""Age at which a plan is made again though nothing has changed here: nodes come and go."""
FOREIGN_SECONDS = 3.0
"""What others use counts once it has been used for so long."""
_NOTHING = Room()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run in the line is told.

    Attributes:
        places: the nodes to start on; None: not now.
        wait: why not now.
        asks: whether Ray's autoscaler is to hear of it.
        room: workers of its kind that all nodes hold, whoever uses them now.
    """

    places: Places | None = None
    wait: Wait | None = None
    asks: bool = False
    room: int = 0


class JobQueue:
    """The line. Any thread may call any method."""

    def __init__(
        self, cluster: Callable[[], Cluster], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the way to ask for nodes; nobody is there yet.

        Args:
            cluster: gives the nodes as they are.
            clock: monotonic seconds.
        """
        self._cluster, self._clock = cluster, clock
        self._lock = threading.RLock()
        self._demands: dict[str, Demand] = {}
        self._holdings: dict[str, Holding] = {}
        self._etas: dict[str, Callable[[], float | None]] = {}
        self._ways: dict[str, Demand] = {}
        self._plan = Plan()
        self._planned = self._looked = float("-inf")
        self._planning = False
        self._changed = False
        self._others = _Others()
        self._closed = False
        self._found: Cluster | None = None
        self._rooms: dict[Bundle, int] = {}
        self.rhythm = Rhythm()
        """How often the runs at work are listened to."""

    def ask(self, demand: Demand) -> None:
        """Stand in the line; or change what is asked for."""
        with self._lock:
            before = self._demands.get(demand.run_id)
            if before is not None and before.places:
                demand = replace(demand, places=before.places)
            if before != demand:
                self._demands[demand.run_id] = demand
                self._changed = True

    def answer(self, run_id: str) -> Answer:
        """Whether a run in the line may start now."""
        self._refresh()
        with self._lock:
            demand = self._demands.get(run_id)
            if demand is None or self._closed:
                return Answer()
            plan = self._plan
            return Answer(
                plan.starts.get(run_id),
                plan.waits.get(run_id),
                run_id in plan.asks,
                self._room(demand.bundle),
            )

    def room(self, bundle: Bundle) -> int:
        """Workers that all nodes hold, whoever uses them now; 0 as long as Ray has not told."""
        self._refresh()
        with self._lock:
            return self._room(bundle)

    def standing(self) -> tuple[dict[str, Holding], dict[str, int]]:
        """The gangs that have workers, by run; and ``Plan.asks``."""
        with self._lock:
            return dict(self._holdings), dict(self._plan.asks)

    def nodes(self) -> Cluster | None:
        """The nodes, at most a second old; None as long as Ray has not told."""
        self._refresh()
        return self._found

    def grants(self, run_id: str, places: Places) -> bool:
        """Whether a run may still start on these nodes."""
        return self.answer(run_id).places == places

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nobody starts in this block: all that it brings stand in the line before anyone does."""
        with self._lock:
            self._closed = True
        try:
            yield
        finally:
            with self._lock:
                self._closed = False

    def hold(
        self, run_id: str, places: Places, eta: Callable[[], float | None] = lambda: None
    ) -> bool:
        """A run has its workers' room.

        Args:
            run_id: whose turn it was.
            places: where the room is.
            eta: gives the seconds that the run will still take, if known.

        Returns:
            Whether it is still its turn; if not, the room must be given back.
        """
        with self._lock:
            demand = self._demands.get(run_id)
            if demand is None or run_id not in self._plan.starts:
                return False
            del self._demands[run_id]
            self._holdings[run_id] = Holding(
                run_id, demand.priority, demand.submitted, demand.bundle, places
            )
            self._etas[run_id] = eta
            self._count()
            return True

    def asked_to_leave(self, run_id: str) -> Demand | None:
        """The run that a holder must make way for."""
        # Without the lock: those who train ask too, and are kept waiting by nobody.
        return self._ways.get(run_id)

    def leaving(self, run_id: str) -> None:
        """A holder is saving, in order to stop or to make way."""
        with self._lock:
            holding = self._holdings.get(run_id)
            if holding is not None and not holding.leaving:
                self._holdings[run_id] = replace(holding, leaving=True)
                self._changed = True

    def pause(self, run_id: str) -> None:
        """A holder's gang is gone, and it will ask again: nobody behind it may take its room."""
        with self._lock:
            holding = self._holdings.pop(run_id, None)
            self._ways.pop(run_id, None)
            if holding is not None:
                self._demands[run_id] = Demand(
                    run_id,
                    holding.priority,
                    holding.submitted,
                    sum(holding.places.values()),
                    holding.bundle,
                    ready=False,
                    places=holding.places,
                )
                self._count()

    def leave(self, run_id: str) -> None:
        """Go for good."""
        with self._lock:
            self._demands.pop(run_id, None)
            self._holdings.pop(run_id, None)
            self._etas.pop(run_id, None)
            self._ways.pop(run_id, None)
            # Nobody need make way for it any more, unless it has begun to.
            for other, way in list(self._ways.items()):
                if way.run_id == run_id and not self._holdings[other].leaving:
                    del self._ways[other]
            self._count()

    def _count(self) -> None:
        """A run has come to its workers, or has lost them."""
        workers = sum(sum(holding.places.values()) for holding in self._holdings.values())
        self.rhythm = Rhythm.of(len(self._holdings), workers)
        self._changed = True

    def _refresh(self) -> None:
        """Make the plan anew if anything may have changed."""
        now = self._clock()
        with self._lock:
            due = self._changed or now - self._planned >= PLAN_SECONDS
            if self._closed or self._planning or not due:
                return
            self._planning = True
        try:
            if now - self._looked >= LOOK_SECONDS:
                # Not under the lock: Ray's head may take its time.
                self._look(now)
            with self._lock:
                self._make_plan(now)
        finally:
            self._planning = False

    def _look(self, now: float) -> None:
        try:
            self._found = self._cluster()
        except Exception as error:
            # A head that is being started anew, say: the nodes are what they were.
            log.warning("cannot ask Ray for its nodes: %s", error)
        self._looked = now

    def _make_plan(self, now: float) -> None:
        found = self._found
        if found is None:
            return
        self._rooms.clear()
        nodes = self._others.without(found, list(self._holdings.values()), now)
        holdings = [
            replace(
                holding,
                leaving=holding.leaving or run_id in self._ways,
                eta_seconds=self._etas[run_id](),
            )
            for run_id, holding in self._holdings.items()
        ]
        self._plan = decide(nodes, list(self._demands.values()), holdings, found.growth)
        self._planned, self._changed = now, False
        for run_id, places in (self._plan.starts | self._plan.kept).items():
            # So that the next plan, too, gives it these nodes.
            self._demands[run_id] = replace(self._demands[run_id], places=places)
        for run_id, way in self._plan.yields.items():
            self._ways[run_id] = self._demands[way]

    def _room(self, bundle: Bundle) -> int:
        if bundle not in self._rooms and self._found is not None:
            totals = [node.total for node in self._found.nodes.values()]
            self._rooms[bundle] = count(bundle, totals)
        return self._rooms.get(bundle, 0)


class _Others:
    """What is used on the nodes by others than gangs: Ray tasks of a data build, say."""

    def __init__(self) -> None:
        self._steady: dict[str, Room] = {}
        self._seen: deque[tuple[float, dict[str, Room]]] = deque()

    def without(self, cluster: Cluster, holdings: list[Holding], now: float) -> dict[str, Room]:
        """The nodes less what others use, which is the least that they were seen to use lately.

        A gang that has just come or gone is not yet, or still, in Ray's count.
        """
        ours: dict[str, Room] = {}
        for holding in holdings:
            for node, number in holding.places.items():
                ours[node] = ours.get(node, _NOTHING).plus(holding.bundle, number)
        used = {
            node: room.total.less(room.free).less(ours.get(node, _NOTHING))
            for node, room in cluster.nodes.items()
        }
        if not self._seen or now - self._seen[-1][0] > FOREIGN_SECONDS:
            # Nobody has looked for long: what stood then stands until it is seen to be otherwise.
            self._seen = deque([(now, self._steady)])
        self._seen.append((now, used))
        while now - self._seen[0][0] > FOREIGN_SECONDS:
            self._seen.popleft()
        self._steady = {
            node: _least(samples.get(node, _NOTHING) for _, samples in self._seen)
            for node in cluster.nodes
        }
        return {node: room.total.less(self._steady[node]) for node, room in cluster.nodes.items()}


def _least(rooms: Iterable[Room]) -> Room:
    return reduce(Room.at_most, rooms)
