"""Room on the cluster, as Ray tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray._private import state as ray_state
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental import internal_kv

from ringworld_platform.drain import draining_nodes
from ringworld_platform.node_types import limits, room_of
from ringworld_platform.room import Room


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """What a node has, and what of it nobody uses."""

    total: Room
    free: Room


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes, and what may come.

    Attributes:
        nodes: by id.
        growth: nodes that an autoscaler may add, by names of their own; None where it may add some
            that Ray does not tell.
        autoscaled: whether there is an autoscaler, which also takes nodes away.
    """

    nodes: Mapping[str, NodeRoom]
    growth: Mapping[str, Room] | None
    autoscaled: bool = False


def cluster(*, fixed: bool = False) -> Cluster:
    """The cluster now.

    Args:
        fixed: it is known that no autoscaler adds nodes.
    """
    nodes = _nodes()
    if fixed:
        return Cluster(nodes, {})
    known = limits()
    if known is None:
        return Cluster(nodes, None, autoscaled=True) if _autoscales() else Cluster(nodes, {})
    growth = known.growth([node.total for node in nodes.values()])
    return Cluster(nodes, growth, autoscaled=True)


def has_gpus() -> bool:
    """Whether any node has a GPU."""
    return ray.cluster_resources().get("GPU", 0) >= 1


def _nodes() -> dict[str, NodeRoom]:
    """The nodes that are alive. One that Ray drains is none: what is on it must go."""
    free = ray_state.available_resources_per_node()
    draining = draining_nodes()
    return {
        node["NodeID"]: NodeRoom(room_of(node["Resources"]), room_of(free.get(node["NodeID"], {})))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    }


def _autoscales() -> bool:
    """Whether the nodes may be an autoscaler's; in doubt, yes.

    Without one, Ray makes up a node type of its own for each node, named by the node's id.
    """
    if is_autoscaler_v2():
        return True
    report = internal_kv._internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    if not report:
        return True
    types = json.loads(report).get("autoscaler_report", {}).get("active_nodes") or {}
    return not all(name.startswith("node_") for name in types)
