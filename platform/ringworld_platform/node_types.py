"""Nodes that Ray's autoscaler may still add, as far as this machine knows.

Ray's own autoscaler tells nobody its node types: only some managed clusters put them where all can
read them. On the head's machine its configuration can be read, from the file that its process was
started with; elsewhere (in a pod beside the head's, say) nothing is known.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private import state as ray_state

from ringworld_platform.room import Room

log = logging.getLogger(__name__)

MAX_GROWTH = 256
"""More nodes of a type than this are not reckoned with at once."""
_MONITOR = "autoscaler"


@dataclass(frozen=True, slots=True)
class NodeType:
    """A kind of node.

    Attributes:
        name: of the type.
        room: what a node of it has.
        most: nodes of it that there may be; None: any number.
    """

    name: str
    room: Room
    most: int | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cluster may grow to.

    Attributes:
        types: kinds of nodes.
        most: nodes of all kinds, the head not counted; None: any number.
    """

    types: tuple[NodeType, ...]
    most: int | None = None

    def growth(self, nodes: Sequence[Room]) -> dict[str, Room]:
        """Nodes that may still come, by names of their own.

        Ray does not tell of which type a node is: each one of a type's size is taken for one of it.

        Args:
            nodes: those that are there, the head too.
        """
        left = MAX_GROWTH if self.most is None else max(0, self.most - (len(nodes) - 1))
        found: dict[str, Room] = {}
        for kind in self.types:
            most = MAX_GROWTH if kind.most is None else kind.most
            more = min(MAX_GROWTH, left, max(0, most - nodes.count(kind.room)))
            found |= {f"{kind.name} {number}": kind.room for number in range(1, more + 1)}
        return found


def limits() -> Limits | None:
    """The cluster's limits; None where they are not known."""
    reported = ray_state.state.get_cluster_config()
    if reported is not None:
        groups = reported.node_group_configs
        # Ray's word for "no limit" is -1.
        return Limits(
            tuple(
                NodeType(
                    group.name,
                    room_of(dict(group.resources)),
                    None if group.max_count < 0 else group.max_count,
                )
                for group in groups
            )
        )
    path = _config_file(ray.get_runtime_context().gcs_address)
    if path is None:
        return None
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        log.warning("cannot read the autoscaler's configuration: %s", error)
        return None


def room_of(resources: Mapping[str, float]) -> Room:
    """The part of Ray's resources that we reckon with."""
    return Room(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def limits_of(config: Mapping[str, Any]) -> Limits | None:
    """The limits in an autoscaler's configuration, in the form that ``ray up`` takes.

    Returns:
        None where a type does not say what its nodes have: the provider decides.
    """
    head = config.get("head_node_type")
    most = config.get("max_workers")
    types = []
    for name, kind in config.get("available_node_types", {}).items():
        if name == head:
            # There is one head, whatever its type says, unless it is a type for others too.
            if not kind.get("max_workers"):
                continue
        resources = kind.get("resources") or {}
        if "CPU" not in resources:
            return None
        types.append(NodeType(name, room_of(resources), kind.get("max_workers", most)))
    return Limits(tuple(types), most)


@lru_cache(maxsize=4)
def _config_file(gcs_address: str) -> Path | None:
    """The configuration that the autoscaler of this cluster was started with."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        ours = f"--gcs-address={gcs_address}" in words
        if ours and any(_MONITOR in word and word.endswith("monitor.py") for word in words):
            for word in words:
                name, _, value = word.partition("=")
                if name == "--autoscaling-config":
                    return Path(value).expanduser()
    return None


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Limits | None:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return limits_of(config)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        log.warning("%s: not an autoscaler's configuration: %s", path, error)
        return None
