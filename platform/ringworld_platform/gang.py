"""The workers of one stage: one placement group, started, watched and ended together.

The first failure ends the whole gang: a rank whose peer is gone waits in a collective for minutes,
while killing and building again takes seconds. A gang never outlives its ``with`` block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ringworld_platform.gang_watch import GangWatch, Listener
from ringworld_platform.pace import Pace
from ringworld_platform.room import Bundle, Places
from ringworld_platform.worker_actors import RingWorkers, Workers
from ringworld_workers.actor import Identity
from ringworld_workers.stage_job import GangJob

log = logging.getLogger(__name__)

NAMESPACE = "ringworld"
NODE_LABEL = "ray.io/node-id"
ROOM_SECONDS = 0.2
START_TIMEOUT_SECONDS = 300.0
CLOSE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class GangSpec:
    """What to ask for.

    Attributes:
        name: prefix of the actors' names, such as ``quickstart-1/1k``.
        size: workers.
        bundle: resources of each worker.
        stage_function: ``module:function`` that each rank runs: it trains a stage, say.
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
        self._rooms: list[Identity] = []
        self._watch = GangWatch(spec.name, spec.size, listener)

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

    def start(self, job: GangJob, *, num_threads: int, collective_timeout_seconds: float) -> None:
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
        self._watch.wait([loads[i] for i in order], START_TIMEOUT_SECONDS)
        (address,) = self._watch.wait([rendezvous], START_TIMEOUT_SECONDS)
        self._watch.wait(
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
        return self._watch.work([actor.run_stage.remote() for actor in self._actors], pace)

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
        call = self._actors[0].prepare_data.remote(recipe, cache)
        (prepared,) = self._watch.work([call], pace, may_be_busy=True)
        return dict(prepared)

    @property
    def identities(self) -> Sequence[Identity]:
        """Where the workers live, by rank, once they are arranged."""
        return self._watch.identities

    @property
    def rooms(self) -> Sequence[Identity]:
        """Where the workers live, or will: on a node that is drained, some may never start."""
        return self.identities or self._rooms

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
        try:
            self._await_end(len(actors), group)
        except Exception as error:
            # The head is gone, say: what ended the gang is what its caller must hear.
            log.warning("%s: cannot see whether it is gone: %s", self.spec.name, error)

    def _await_end(self, size: int, group: PlacementGroup | None) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        while ray.is_initialized() and time.monotonic() < deadline:
            names_gone = not any(_exists(self._name(rank)) for rank in range(size))
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
        self._rooms = [
            Identity(nodes[index], addresses.get(nodes[index], nodes[index]), 0, ())
            for index in order
        ]

    def _arrange(self) -> list[int]:
        """Give out the ranks by node, then GPU; returns the actors' old places in the new order.

        A node's GPUs are handed out in the order in which actors start, so that a rank may
        differ from the number in its actor's name there; on CPU they are the same.
        """
        found: list[Identity] = self._watch.wait(
            [actor.identity.remote() for actor in self._actors], START_TIMEOUT_SECONDS
        )
        order = sorted(range(len(found)), key=lambda i: (found[i].ip, found[i].node, found[i].gpus))
        self._actors = [self._actors[i] for i in order]
        self._watch.open(self._actors, [found[i] for i in order])
        return order


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
