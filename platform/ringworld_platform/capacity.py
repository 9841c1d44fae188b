"""Room on the cluster, as Ray tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray._private import state as ray_state

from ringworld_platform.room import Bundle, Room, count

__all__ = ["Bundle", "Capacity", "Cluster", "NodeRoom", "capacity", "cluster", "has_gpus"]


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bundles that the cluster holds in all, and those free now."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """What a node has, and what of it nobody uses."""

    total: Room
    free: Room


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes by id, and those that an autoscaler may add, by names of their own."""

    nodes: Mapping[str, NodeRoom]
    growth: Mapping[str, Room]


def capacity(bundle: Bundle) -> Capacity:
    """Count a bundle's places on the nodes that are alive and stay."""
    nodes = cluster().nodes.values()
    return Capacity(
        count(bundle, [node.total for node in nodes]), count(bundle, [node.free for node in nodes])
    )


def cluster() -> Cluster:
    """The cluster now. A node that Ray drains is none: what is on it must go."""
    free = ray_state.available_resources_per_node()
    draining = ray_state.state.get_draining_nodes()
    nodes = {
        node["NodeID"]: NodeRoom(_room(node["Resources"]), _room(free.get(node["NodeID"], {})))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    }
    return Cluster(nodes, _growth(nodes))


def has_gpus() -> bool:
    """Whether any node has a GPU."""
    return ray.cluster_resources().get("GPU", 0) >= 1


def _growth(nodes: Mapping[str, NodeRoom]) -> dict[str, Room]:
    """The nodes that the autoscaler's configuration still allows; none where there is none.

    Ray does not tell of which type a node is: each one of a type's size is taken for one of it.
    """
    config = ray_state.state.get_cluster_config()
    if config is None:
        return {}
    there = [node.total for node in nodes.values()]
    found: dict[str, Room] = {}
    for group in config.node_group_configs:
        room = _room(dict(group.resources))
        more = min(int(group.max_count), MAX_GROWTH) - there.count(room)
        found |= {f"{group.name}-{number}": room for number in range(max(0, more))}
    most = int(config.max_resources.get("CPU", 0)) if config.max_resources else 0
    del most
    return found


def _room(resources: Mapping[str, float]) -> Room:
    return Room(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))
