"""How often runs are listened to and saved: the more of them are at work, the less often each.

A controller of a few runs hears of every rank five times a second. With a thousand ranks it would
do nothing else, so that it shares out a fixed number of questions and saves a second. That a worker
has died, raised or finished is never asked for: Ray tells it at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_RANKS_A_SECOND = 28
"""Questions to first ranks, whose records the logs and the state show."""
OTHER_RANKS_A_SECOND = 40
SAVES_A_SECOND = 10
LOOKS_A_SECOND = 80
"""Looks of all runs at what is asked of them: to stop, to make way."""
MOST_SECONDS = 20.0
MOST_SAVE_SECONDS = 14.0
"""Below half of an owner's lease: it says in time that it lives."""
WATCHED_SECONDS = 1.0
"""Questions to the first rank of a run whose metrics somebody follows."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """Seconds between two of a kind, for each run or rank.

    Attributes:
        first_rank: questions to a gang's rank 0.
        other_rank: questions to another rank.
        save: saves of a state of which only counts have changed.
        look: looks at what is asked of the run.
    """

    first_rank: float = 0.2
    other_rank: float = 0.2
    save: float = 1.0
    look: float = 0.1

    @classmethod
    def of(cls, runs: int, workers: int) -> Rhythm:
        """The rhythm of so many runs at work, which have so many workers in all."""
        quick = cls()
        return cls(
            first_rank=_share(quick.first_rank, runs / FIRST_RANKS_A_SECOND),
            other_rank=_share(quick.other_rank, (workers - runs) / OTHER_RANKS_A_SECOND),
            save=_share(quick.save, runs / SAVES_A_SECOND, MOST_SAVE_SECONDS),
            look=_share(quick.look, runs / LOOKS_A_SECOND),
        )

    def watched(self) -> Rhythm:
        """The rhythm of one run among them that somebody watches."""
        return replace(
            self,
            first_rank=min(self.first_rank, WATCHED_SECONDS),
            look=min(self.look, WATCHED_SECONDS / 2),
        )

    def rank(self, rank: int) -> float:
        """Seconds between two questions to this rank."""
        return self.first_rank if rank == 0 else self.other_rank


def _share(least: float, seconds: float, most: float = MOST_SECONDS) -> float:
    return min(max(least, seconds), most)
