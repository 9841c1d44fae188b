"""Room on nodes, and where the bundles of a gang go. Plain data: no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Places = Mapping[str, int]
"""Bundles by node id."""


@dataclass(frozen=True, slots=True)
class Room:
    """CPUs and GPUs of a node, or a part of them."""

    cpus: float = 0.0
    gpus: float = 0.0

    def plus(self, bundle: Bundle, count: int) -> Room:
        """This and the room of ``count`` bundles; less, where it is negative."""
        return Room(self.cpus + count * bundle.cpus, self.gpus + count * bundle.gpus)

    def less(self, other: Room) -> Room:
        """What is left without ``other``; no less than nothing."""
        return Room(max(0.0, self.cpus - other.cpus), max(0.0, self.gpus - other.gpus))

    def at_most(self, other: Room) -> Room:
        """The smaller of both, by resource."""
        return Room(min(self.cpus, other.cpus), min(self.gpus, other.gpus))


@dataclass(frozen=True, slots=True)
class Bundle:
    """Resources of one worker."""

    cpus: int
    gpus: int = 0

    def resources(self) -> dict[str, float]:
        """As a placement group's bundle."""
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def count_in(self, room: Room) -> int:
        """How many of these fit."""
        by_cpu = int(room.cpus // self.cpus)
        count = min(by_cpu, int(room.gpus // self.gpus)) if self.gpus else by_cpu
        return max(0, count)

    def named(self, count: int) -> str:
        """``16 GPU bundles of 8 CPUs``."""
        kind = "GPU bundle" if self.gpus else "CPU bundle"
        return f"{count} {kind}{'s' * (count != 1)} of {self.cpus} CPU{'s' * (self.cpus != 1)}"


Rooms = Mapping[str, Room]
"""Room by node id."""


def place(size: int, bundle: Bundle, rooms: Rooms, kept: Places | None = None) -> Places | None:
    """Choose nodes for all bundles of a gang.

    On one node if any holds them all, the one that they fill best; else on as few as it takes.
    Bundles without a GPU go to nodes with GPUs last: there they would keep GPUs idle.

    Args:
        size: bundles.
        bundle: resources of each.
        rooms: what may be taken.
        kept: the choice made before; it stands where it still fits.

    Returns:
        Bundles by node; None where they do not fit.
    """
    if kept and sum(kept.values()) == size:
        empty = Room()
        if all(bundle.count_in(rooms.get(node, empty)) >= n for node, n in kept.items()):
            return kept
    counts = {node: count for node, room in rooms.items() if (count := bundle.count_in(room))}
    if sum(counts.values()) < size:
        return None

    def wasteful(node: str) -> bool:
        return not bundle.gpus and rooms[node].gpus > 0

    whole = [node for node, count in counts.items() if count >= size]
    if whole:
        return {min(whole, key=lambda node: (wasteful(node), counts[node], node)): size}
    chosen: dict[str, int] = {}
    for node in sorted(counts, key=lambda node: (wasteful(node), -counts[node], node)):
        left = size - sum(chosen.values())
        if left == 0:
            break
        chosen[node] = min(left, counts[node])
    return chosen


def count(bundle: Bundle, rooms: Iterable[Room]) -> int:
    """How many bundles fit into several rooms."""
    return sum(bundle.count_in(room) for room in rooms)


def take(rooms: dict[str, Room], bundle: Bundle, places: Places) -> None:
    """Take a gang's room away from the nodes that are among ``rooms``."""
    for node, number in places.items():
        if node in rooms:
            rooms[node] = rooms[node].plus(bundle, -number)
