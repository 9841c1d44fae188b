"""Asking every rank of a gang at once what it does, and the nodes of those that do not answer.

A rank that is blocked in a collective still answers on its other threads; one whose process is
stopped, or whose node is unreachable, does not.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ringworld_workers.actor import Examined, Identity
from ringworld_workers.stacks import ProcessLook, look_at_process

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
MOST_LOOKS = 8
"""The odd ranks are few; if none of a thousand answers, a few of them tell what is the matter."""

_LOOK = ray.remote(num_cpus=0, max_retries=0)(look_at_process)


class Inquiry:
    """A question to the ranks, which work on their answers while the asker does something else."""

    def __init__(self, actors: Sequence[Any], ranks: Collection[int]) -> None:
        """Ask these ranks.

        Args:
            actors: the workers, by rank.
            ranks: whom to ask.
        """
        self._questions = {actors[rank].examine.remote(): rank for rank in ranks}

    def answers(self, timeout_seconds: float) -> dict[int, Examined]:
        """The answers, by rank, of those who answer in time."""
        if not self._questions:
            return {}
        refs = list(self._questions)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_seconds)
        found: dict[int, Examined] = {}
        for ref in ready:
            try:
                found[self._questions[ref]] = ray.get(ref)
            except RayError:
                continue
        return found


def look_at_silent(identities: Sequence[Identity], ranks: Sequence[int]) -> dict[int, ProcessLook]:
    """Have nodes look at the processes of ranks that do not answer.

    Args:
        identities: of all ranks, by rank.
        ranks: who is silent.

    Returns:
        What is seen, by rank; nothing of those whose node does not answer either.
    """
    here = ray.get_runtime_context().get_node_id()
    found: dict[int, ProcessLook] = {}
    asked: dict[Any, int] = {}
    for rank in ranks[:MOST_LOOKS]:
        identity = identities[rank]
        if identity.node == here:
            found[rank] = look_at_process(identity.pid, identity.errors_file)
            continue
        on_node = NodeAffinitySchedulingStrategy(identity.node, soft=False)
        look = _LOOK.options(scheduling_strategy=on_node)
        asked[look.remote(identity.pid, identity.errors_file)] = rank
    ready = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)[0] if asked else []
    for ref in ready:
        try:
            found[asked[ref]] = ray.get(ref)
        except RayError as error:
            log.info("no look at rank %d: %s", asked[ref], error)
    return found
