"""Whether the kernel has ended a worker to get its memory back.

Ray sees that a connection is closed, and not by what. The kernel counts the processes that it
kills for memory: a worker reads the counters before it begins, and if it is lost, another process
of its node reads them again. Nobody tells which process was killed: so "probably".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ringworld_platform.first_cause import Suspect
from ringworld_platform.recovery import NODE_MEMORY, FailureKind
from ringworld_workers.actor import Examined, Identity
from ringworld_workers.oom_kills import OomKills, read_oom_kills, rise

log = logging.getLogger(__name__)

NODE_SECONDS = 3.0
"""A node that has not said by then may be gone as a whole: a gang is not kept waiting for it."""


@ray.remote(num_cpus=0, max_retries=0)
def _read(file: str) -> OomKills:
    return read_oom_kills(file)


def explain_loss(
    suspect: Suspect,
    identities: Sequence[Identity],
    answers: Mapping[int, Examined],
    ask: Callable[[Identity], OomKills] | None = None,
) -> Suspect:
    """Say of a worker that was lost whether the kernel has killed it, as far as that is known.

    Args:
        suspect: of the first cause; one that has another explanation is given back as it is.
        identities: of all ranks, by rank; empty if they were not placed yet.
        answers: of the ranks that have answered since the loss.
        ask: reads the counters of a worker's node where no rank there has answered: ``ask_node``.
    """
    if not suspect.unexplained or suspect.rank >= len(identities):
        return suspect
    lost = identities[suspect.rank]
    if not lost.oom_kills.known:
        return suspect
    now = _heard(lost, identities, answers) or (ask or ask_node)(lost)
    found = rise(lost.oom_kills, now)
    if found is None:
        return suspect
    text = (
        f"rank {suspect.rank} (pid {lost.pid} on {lost.ip}) was probably killed by the kernel for "
        f"memory: oom_kill {'of its cgroup ' if found.of_cgroup else ''}on {lost.ip} rose from "
        f"{found.before} to {found.after} since its gang began"
    )
    kind, facts = FailureKind.OUT_OF_MEMORY, {NODE_MEMORY: True}
    failure = replace(suspect.failure, kind=kind, text=text, facts=facts)
    return replace(suspect, failure=failure, unexplained=False)


def _heard(
    lost: Identity, identities: Sequence[Identity], answers: Mapping[int, Examined]
) -> OomKills | None:
    """The counters as another rank has told them, which lives where the lost one did."""
    for rank, answer in answers.items():
        counts = answer.oom_kills
        same_cgroup = counts.cgroup_file == lost.oom_kills.cgroup_file
        if identities[rank].node == lost.node and same_cgroup and counts.known:
            return counts
    return None


def ask_node(lost: Identity, timeout_seconds: float = NODE_SECONDS) -> OomKills:
    """Read the counters of a worker's node: here if it is this one, else by a task there.

    Args:
        lost: the worker.
        timeout_seconds: for a task to start there and to answer.

    Returns:
        The counters now; none where the node does not say in time.
    """
    file = lost.oom_kills.cgroup_file
    if lost.node == ray.get_runtime_context().get_node_id():
        return read_oom_kills(file)
    on_node = NodeAffinitySchedulingStrategy(lost.node, soft=False)
    task = _read.options(scheduling_strategy=on_node).remote(file)
    try:
        counts: OomKills = ray.get(task, timeout=timeout_seconds)
    except RayError as error:
        log.info("%s does not say whether its kernel killed a worker: %s", lost.ip, error)
        return OomKills()
    return counts
