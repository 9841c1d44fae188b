"""The workers of one stage: one placement group, started, watched and ended together.

The first failure ends the whole gang: a rank whose peer is gone waits in a collective for minutes,
while killing and building again takes seconds. A gang never outlives its ``with`` block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ringworld_platform.first_cause import Suspect, first_cause, lost_worker, raised
from ringworld_platform.outboxes import Hearer, Outboxes
from ringworld_platform.pace import Pace
from ringworld_platform.recovery import Failure, FailureKind
from ringworld_platform.room import Bundle, Places
from ringworld_platform.stall import diagnose
from ringworld_platform.worker_actors import RingWorkers, Workers
from ringworld_workers.actor import Identity, WorkerFailure
from ringworld_workers.stage_job import StageJob

log = logging.getLogger(__name__)

NAMESPACE = "ringworld"
NODE_LABEL = "ray.io/node-id"
ROOM_SECONDS = 0.2
WATCH_SECONDS = 0.1
GRACE_SECONDS = 0.3
START_TIMEOUT_SECONDS = 300.0
DRAIN_SECONDS = 2.0
CLOSE_SECONDS = 15.0


class GangFailed(Exception):
    """The gang has ended before its work was done."""

    def __init__(self, failure: Failure) -> None:
        """Carry the first cause."""
        super().__init__(failure.text)
        self.failure = failure


class Listener(Hearer, Protocol):
    """Hears a gang while it works. Exceptions that it raises end the gang's work."""

    def tick(self) -> None:
        """Called several times a second."""

    def limit(self, seconds: float) -> None:
        """From now on, so long without progress is a failure."""


@dataclass(frozen=True, slots=True)
class GangSpec:
    """What to ask for.

    Attributes:
        name: prefix of the actors' names, such as ``quickstart-1/1k``.
        size: workers.
        bundle: resources of each worker.
        stage_function: ``module:function`` that trains a stage.
        prepare_function: ``module:function`` that builds a data recipe.
        workers: makes and ends the workers.
    """

    name: str
    size: int
    bundle: Bundle
    stage_function: str
    prepare_function: str
    workers: Workers = field(default_factory=RingWorkers)


class Gang:
    """One gang, from its placement group to its removal; use it in a ``with`` block, one thread."""

    def __init__(self, spec: GangSpec, listener: Listener) -> None:
        """Ask for nothing yet."""
        self.spec, self._listener = spec, listener
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._made: list[Any] = []
        self.identities: list[Identity] = []
        self._outboxes = Outboxes(listener)

    def __enter__(self) -> Gang:
        """Nothing is held yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every worker, however the block ended."""
        self.close()

    def acquire(self, places: Places, still: Callable[[], bool]) -> bool:
        """Take room for all workers at once, on these nodes.

        Args:
            places: workers by node id, as many as the gang has.
            still: whether it is still meant to be; asked several times a second.

        Returns:
            Whether it was there; if not, nothing is held.
        """
        self.give_back()
        bundles = [self.spec.bundle.resources()] * self.spec.size
        nodes = [{NODE_LABEL: node} for node, number in places.items() for _ in range(number)]
        self._group = placement_group(
            bundles, strategy="PACK", name=self.spec.name, bundle_label_selector=nodes
        )
        asked = time.monotonic()
        while placement_group_table(self._group).get("state") != "CREATED":
            time.sleep(min(ROOM_SECONDS, 0.01 + (time.monotonic() - asked) / 4))
            self._listener.tick()
            if not still():
                self.give_back()
                return False
        return True

    def ask_for_nodes(self, asks: bool) -> None:
        """Let Ray's autoscaler know what is waited for, or no longer.

        A placement group that finds no room makes it add nodes; that group is never used.
        """
        if asks and self._group is None:
            bundles = [self.spec.bundle.resources()] * self.spec.size
            self._group = placement_group(bundles, strategy="PACK", name=self.spec.name)
        elif not asks:
            self.give_back()

    def give_back(self) -> None:
        """Let go of the room, before the workers start."""
        group, self._group = self._group, None
        if group is not None:
            _quietly(remove_placement_group, group)

    def start(self, job: StageJob, *, num_threads: int, collective_timeout_seconds: float) -> None:
        """Start the workers, sort them, let them meet, and lay out the mesh.

        Raises:
            GangFailed: a worker could not start or join.
        """
        self._spawn()
        loads = [actor.load.remote() for actor in self._actors]
        order = self._arrange()
        rendezvous = self._actors[0].open_rendezvous.remote(
            self.spec.size, collective_timeout_seconds
        )
        self._watch([loads[i] for i in order], START_TIMEOUT_SECONDS)
        (address,) = self._watch([rendezvous], START_TIMEOUT_SECONDS)
        self._watch(
            [
                actor.setup.remote(rank, *address, job, num_threads, collective_timeout_seconds)
                for rank, actor in enumerate(self._actors)
            ],
            START_TIMEOUT_SECONDS,
        )

    def run(self, pace: Pace) -> list[dict[str, Any]]:
        """Run the stage on every rank to its end.

        Args:
            pace: says how long no heartbeat of any rank is a failure; it learns from the steps.

        Returns:
            The ranks' results.

        Raises:
            GangFailed: the first failure of any rank.
        """
        self._outboxes.reset_clock()
        self._outboxes.pace = pace
        results = self._watch([actor.run_stage.remote() for actor in self._actors], pace=pace)
        self._outboxes.drain(range(self.spec.size), DRAIN_SECONDS)
        return results

    def prepare_data(self, recipe: str, cache: str, pace: Pace) -> dict[str, Any]:
        """Build a data recipe on this gang's one worker.

        Args:
            recipe: path of the recipe.
            cache: folder of prepared data.
            pace: a worker that has told nothing for as long as it says, and does not answer
                either, is given up. One that answers may work on: some parts of a build are long.

        Raises:
            GangFailed: the build raised, or the worker was lost.
        """
        self._spawn()
        self._arrange()
        self._outboxes.reset_clock()
        (prepared,) = self._watch(
            [self._actors[0].prepare_data.remote(recipe, cache)], pace=pace, may_be_busy=True
        )
        self._outboxes.drain([0], DRAIN_SECONDS)
        return dict(prepared)

    def request_stop(self) -> None:
        """Ask every rank to save and stop at its next step."""
        for actor in self._actors:
            actor.request_stop.remote()

    def close(self) -> None:
        """Kill every worker, give the resources back, and see that both has happened."""
        actors, self._made, self._actors = self._made, [], []
        for actor in actors:
            _quietly(self.spec.workers.end, actor)
        group, self._group = self._group, None
        if group is not None:
            _quietly(remove_placement_group, group)
        deadline = time.monotonic() + CLOSE_SECONDS
        while ray.is_initialized() and time.monotonic() < deadline:
            names_gone = not any(_exists(self._name(rank)) for rank in range(len(actors)))
            group_gone = group is None or placement_group_table(group).get("state") == "REMOVED"
            if names_gone and group_gone:
                return
            time.sleep(0.02)
        if ray.is_initialized():
            log.warning("%s was not gone after %g s", self.spec.name, CLOSE_SECONDS)

    def _name(self, rank: int) -> str:
        return f"{self.spec.name}/rank-{rank}"

    def _spawn(self) -> None:
        """Make the actors, neighbours in the ring on one node as far as possible."""
        group = self._group
        if group is None:
            raise RuntimeError("acquire() comes before the workers start")
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        nodes = placement_group_table(group)["bundles_to_node_id"]
        order = sorted(nodes, key=lambda index: (addresses.get(nodes[index], ""), nodes[index]))
        for rank, index in enumerate(order):
            _clear_name(self._name(rank))
            worker = self.spec.workers.make(
                self.spec.stage_function,
                self.spec.prepare_function,
                name=self._name(rank),
                namespace=NAMESPACE,
                num_cpus=self.spec.bundle.cpus,
                num_gpus=self.spec.bundle.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=int(index)
                ),
            )
            self._made.append(worker)
        self._actors = list(self._made)

    def _arrange(self) -> list[int]:
        """Give out the ranks by node, then GPU; returns the actors' old places in the new order.

        A node's GPUs are handed out in the order in which actors start, so that a rank may
        differ from the number in its actor's name there; on CPU they are the same.
        """
        found: list[Identity] = self._watch(
            [actor.identity.remote() for actor in self._actors], START_TIMEOUT_SECONDS
        )
        order = sorted(range(len(found)), key=lambda i: (found[i].ip, found[i].node, found[i].gpus))
        self._actors = [self._actors[i] for i in order]
        self.identities = [found[i] for i in order]
        self._outboxes.open(self._actors)
        return order

    # --- watching ---

    def _watch(
        self,
        calls: Sequence[Any],
        timeout_seconds: float | None = None,
        pace: Pace | None = None,
        may_be_busy: bool = False,
    ) -> list[Any]:
        """Wait for one reply of each rank, fetching records meanwhile.

        Args:
            calls: one a rank.
            timeout_seconds: longest wait for all of them.
            pace: longest time without a heartbeat of any rank.
            may_be_busy: a rank that answers at all has not stalled.

        Returns:
            The replies, in the order of ``calls``.
        """
        waiting = {call: rank for rank, call in enumerate(calls)}
        replies: list[Any] = [None] * len(calls)
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while waiting:
            self._listener.tick()
            questions = self._outboxes.ask()
            ready, _ = ray.wait([*waiting, *questions], num_returns=1, timeout=WATCH_SECONDS)
            for ref in ready:
                rank = waiting.pop(ref, None)
                if rank is None:
                    self._outboxes.take(ref)
                    continue
                reply = self._reply(rank, ref)
                if isinstance(reply, Suspect):
                    self._fail(reply, waiting)
                replies[rank] = reply
            if waiting and deadline is not None and time.monotonic() > deadline:
                ranks = ", ".join(str(rank) for rank in sorted(waiting.values()))
                text = f"rank {ranks} of {self.spec.name} not ready after {timeout_seconds:g} s"
                raise GangFailed(Failure(FailureKind.STALL, text, min(waiting.values())))
            if pace is not None:
                self._refuse_stall(pace, waiting.values(), may_be_busy)
        return replies

    def _reply(self, rank: int, ref: Any) -> Any:
        """A rank's reply, or what it is suspected of."""
        try:
            reply = ray.get(ref)
        except RayActorError as error:
            return lost_worker(rank, self._where(rank), error)
        except RayError as error:
            return raised(rank, WorkerFailure.of(error))
        return raised(rank, reply) if isinstance(reply, WorkerFailure) else reply

    def _where(self, rank: int) -> str:
        if rank >= len(self.identities):
            return "not yet placed"
        identity = self.identities[rank]
        return f"pid {identity.pid} on {identity.ip}"

    def _fail(self, first: Suspect, waiting: dict[Any, int]) -> None:
        """End the watch. The first error seen may be an echo: wait a moment for others.

        Raises:
            GangFailed: always.
        """
        suspects = [first]
        lost = {first.rank} if first.lost else set()
        deadline = time.monotonic() + GRACE_SECONDS
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ref in ray.wait(list(waiting), num_returns=1, timeout=left)[0]:
                rank = waiting.pop(ref)
                reply = self._reply(rank, ref)
                if isinstance(reply, Suspect):
                    suspects.append(reply)
                    if reply.lost:
                        lost.add(rank)
        self._outboxes.drain([r for r in range(self.spec.size) if r not in lost], GRACE_SECONDS)
        raise GangFailed(first_cause(suspects))

    def _refuse_stall(self, pace: Pace, waiting: Collection[int], may_be_busy: bool) -> None:
        limit = pace.limit({self._outboxes.phase(rank) for rank in waiting})
        self._listener.limit(limit.seconds)
        if not waiting or time.monotonic() - self._outboxes.progressed < limit.seconds:
            return
        places = [self._where(rank) for rank in range(self.spec.size)]
        failure = diagnose(self._actors, places, waiting, limit, may_be_busy=may_be_busy)
        if failure is not None:
            raise GangFailed(failure)
        self._outboxes.reset_clock()


def _exists(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _clear_name(name: str) -> None:
    """End an actor that an earlier controller left under this name."""
    deadline = time.monotonic() + CLOSE_SECONDS
    while time.monotonic() < deadline:
        try:
            left = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return
        _quietly(ray.kill, left)
        time.sleep(0.02)


def _quietly(action: Callable[[Any], Any], subject: Any) -> None:
    """Clean-up goes on whatever one part of it says."""
    try:
        action(subject)
    except Exception as error:
        log.debug("while cleaning up: %s", error)
