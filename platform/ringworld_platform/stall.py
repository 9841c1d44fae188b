"""Which rank holds up a gang that makes no progress, and what every rank was doing.

A rank that is blocked in a collective still answers on its other threads; one whose process is
stopped, or whose node is unreachable, does not. How long ago a rank took its last step tells
nothing: all of them wait for the odd one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from ringworld_platform.pace import Limit
from ringworld_platform.recovery import Failure, FailureKind
from ringworld_workers.recorder import Progress

PROBE_SECONDS = 0.5
STACKS_SECONDS = 2.0


def diagnose(
    actors: Sequence[Any],
    places: Sequence[str],
    waiting: Collection[int],
    limit: Limit,
    *,
    may_be_busy: bool = False,
) -> Failure | None:
    """Ask every rank what it does, and name the odd one.

    Args:
        actors: the workers, by rank.
        places: where they live, in words, by rank.
        waiting: ranks whose work is not done.
        limit: for how long no rank has made progress, and why that is too long.
        may_be_busy: a rank that answers is taken to be at work, however long its phase lasts.

    Returns:
        The failure, with all stacks in its details; None if all are merely busy.
    """
    answers: dict[int, Progress] = _ask(actors, lambda a: a.progress.remote(), PROBE_SECONDS)
    silent = [rank for rank in sorted(waiting) if rank not in answers]
    if not silent and may_be_busy:
        return None
    if silent:
        odd = silent[0]
        names = ", ".join(f"rank {rank} ({places[rank]})" for rank in silent)
        told = f"{names} does not answer"
    else:
        odd = min(waiting, key=lambda r: (answers[r].step, answers[r].count, answers[r].since))
        progress = answers[odd]
        told = f"rank {odd} ({places[odd]}) is behind, in {progress.phase} of step {progress.step}"
    others = "; ".join(
        f"rank {rank} is in {found.phase} of step {found.step}"
        for rank, found in sorted(answers.items())
        if rank != odd
    )
    stacks: dict[int, str] = _ask(actors, lambda a: a.dump_stacks.remote(), STACKS_SECONDS)
    details = "\n".join(f"===== rank {rank}\n{text}" for rank, text in sorted(stacks.items()))
    text = f"no progress for {round(limit.seconds, 1):g} s ({limit.why}): {told}"
    if others:
        text += f" ({others})"
    return Failure(FailureKind.STALL, text, odd, details)


def _ask(
    actors: Sequence[Any], question: Callable[[Any], Any], timeout_seconds: float
) -> dict[int, Any]:
    """Answers by rank of those who answer in time."""
    refs = {question(actor): rank for rank, actor in enumerate(actors)}
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_seconds)
    answers: dict[int, Any] = {}
    for ref in ready:
        try:
            answers[refs[ref]] = ray.get(ref)
        except RayError:
            continue
    return answers
