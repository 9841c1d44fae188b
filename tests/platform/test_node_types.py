"""What an autoscaler's configuration says of the nodes that may come."""

from __future__ import annotations

from ringworld_platform.node_types import Limits, NodeType, limits_of
from ringworld_platform.room import Room

CONFIG = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 2}, "max_workers": 0},
        "small": {"resources": {"CPU": 4}, "max_workers": 2},
        "gpus": {"resources": {"CPU": 64, "GPU": 8, "memory": 1e12}},
    },
}


def test_node_types_are_read_from_an_autoscalers_configuration() -> None:
    known = limits_of(CONFIG)
    types = (NodeType("small", Room(4), 2), NodeType("gpus", Room(64, 8), 3))
    assert known == Limits(types, 3)


def test_growth_keeps_to_the_limits_of_each_type_and_of_all() -> None:
    known = limits_of(CONFIG)
    assert known is not None
    head, small, gpus = Room(2), Room(4), Room(64, 8)
    assert list(known.growth([head])) == ["small 1", "small 2", "gpus 1", "gpus 2", "gpus 3"]
    assert list(known.growth([head, small, gpus])) == ["small 1", "gpus 1"], "three nodes in all"
    assert known.growth([head, small, small, gpus]) == {}


def test_a_type_whose_nodes_are_unknown_makes_the_limits_unknown() -> None:
    types = {**CONFIG["available_node_types"], "cloud": {"node_config": {"type": "m5"}}}  # type: ignore[dict-item]
    assert limits_of({**CONFIG, "available_node_types": types}) is None
