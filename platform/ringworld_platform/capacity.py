"""Room on the cluster: how many workers of a kind it holds, how many it could start now."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from ringworld_platform.drain import draining_nodes


@dataclass(frozen=True, slots=True)
class Bundle:
    """Resources of one worker."""

    cpus: int
    gpus: int = 0

    def resources(self) -> dict[str, float]:
        """As a placement group's bundle."""
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def count_in(self, resources: dict[str, float]) -> int:
        """How many of these fit into resources."""
        by_cpu = int(resources.get("CPU", 0) // self.cpus)
        return min(by_cpu, int(resources.get("GPU", 0) // self.gpus)) if self.gpus else by_cpu


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bundles that the cluster holds in all, and those free now."""

    total: int
    free: int

    def shortage(self, size: int, bundle: Bundle) -> str:
        """Why ``size`` bundles do not start now, in one line."""
        kind = f"GPU bundles of 1 GPU and {bundle.cpus}" if bundle.gpus else "CPU bundles of"
        needs = f"needs {size} {kind} CPUs" if bundle.gpus else f"needs {size} {kind} {bundle.cpus}"
        if self.total < size:
            return (
                f"{needs}; the cluster has {self.total} in all, so it will never start on these "
                "nodes: add nodes, or shrink the stage's mesh or resources.cpus_per_worker"
            )
        return f"{needs}; the cluster has {self.free} free of {self.total}"


def capacity(bundle: Bundle) -> Capacity:
    """Count a bundle's places on the nodes that are alive, and stay."""
    leaving = draining_nodes()
    total = sum(
        bundle.count_in(node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    )
    return Capacity(total, min(total, bundle.count_in(ray.available_resources())))


def has_gpus() -> bool:
    """Whether any node has a GPU."""
    return ray.cluster_resources().get("GPU", 0) >= 1
