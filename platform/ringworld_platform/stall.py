"""Which rank holds up a gang that makes no progress. Pure: what the ranks said is given.

How long ago a rank took its last step tells nothing: all of them wait for the odd one. So the odd
one is the rank that does not answer; else the one that waits for nobody, while others wait in a
collective; else the one that is behind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from ringworld_platform.pace import Limit
from ringworld_platform.recovery import Failure, FailureKind
from ringworld_workers.actor import Examined
from ringworld_workers.recorder import Progress
from ringworld_workers.stacks import ProcessLook

MOST_GROUPS = 4


def moved_on(answers: Mapping[int, Examined], heard: Sequence[Progress]) -> bool:
    """Whether a rank has done what nobody has heard of yet: the listener was slow, not the gang.

    Args:
        answers: of the ranks that answer.
        heard: the last heartbeat that was heard of each rank, by rank.
    """
    return any(found.progress.count > heard[rank].count for rank, found in answers.items())


def diagnose(
    answers: Mapping[int, Examined],
    looks: Mapping[int, ProcessLook],
    places: Sequence[str],
    waiting: Collection[int],
    limit: Limit,
) -> Failure:
    """Name the odd rank.

    Args:
        answers: of the ranks that answer.
        looks: at the processes of those that do not.
        places: where the ranks live, in words, by rank.
        waiting: ranks whose work is not done.
        limit: for how long no rank has made progress, and why that is too long.
    """
    silent = [rank for rank in sorted(waiting) if rank not in answers]
    heard = [rank for rank in sorted(waiting) if rank in answers]
    blocked = [rank for rank in heard if answers[rank].stacks.waits_in]
    free = [rank for rank in heard if not answers[rank].stacks.waits_in]
    ended = [rank for rank in range(len(places)) if rank not in waiting]
    if silent:
        odd = silent[0]
        told = "; ".join(_silent(rank, places[rank], looks.get(rank)) for rank in silent[:4])
        told += f"; {len(silent) - 4} more do not answer" if len(silent) > 4 else ""
    elif blocked and free:
        odd = _behind(free, answers)
        told = f"rank {odd} ({places[odd]}) does not come: it is {_doing(answers[odd])}"
    elif blocked and ended:
        odd = ended[0]
        told = f"rank {odd} ({places[odd]}) has ended its stage, and others wait for it"
    else:
        odd = _behind(heard, answers)
        told = f"rank {odd} ({places[odd]}) is behind: it is {_doing(answers[odd])}"
    text = f"no progress for {round(limit.seconds, 1):g} s ({limit.why}): {told}"
    others = _groups({rank: found for rank, found in answers.items() if rank != odd})
    return Failure(FailureKind.STALL, text + (f" ({others})" if others else ""), odd)


def _behind(ranks: Collection[int], answers: Mapping[int, Examined]) -> int:
    def order(rank: int) -> tuple[int, int, float]:
        progress = answers[rank].progress
        return progress.step, progress.count, progress.since

    return min(ranks, key=order)


def _silent(rank: int, place: str, look: ProcessLook | None) -> str:
    why = f": its process {look.state}" if look is not None else ""
    return f"rank {rank} ({place}) does not answer{why}"


def _doing(found: Examined) -> str:
    what = f"in {found.progress.phase} of step {found.progress.step}"
    return what + (f", at {found.stacks.at}" if found.stacks.at else "")


def _groups(answers: Mapping[int, Examined]) -> str:
    """What the others do, those that do the same together."""
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, found in sorted(answers.items()):
        waits = f", waiting in {found.stacks.waits_in}" if found.stacks.waits_in else ""
        groups[f"in {found.progress.phase} of step {found.progress.step}{waits}"].append(rank)
    parts = []
    for doing, ranks in sorted(groups.items(), key=lambda group: -len(group[1]))[:MOST_GROUPS]:
        who = f"rank {ranks[0]} is" if len(ranks) == 1 else f"{_ranges(ranks)} are"
        parts.append(f"{who} {doing}")
    return "; ".join(parts)


def _ranges(ranks: Sequence[int]) -> str:
    """Ranks in order as ``ranks 0-3, 5``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return "ranks " + ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans)
