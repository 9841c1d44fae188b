"""Exceptions that come back: the same words at the same step, twice in a row, are no accident."""

from __future__ import annotations

from ringworld_platform.recovery import Failure, FailureKind


class Repeats:
    """Remembers the last exception of one run."""

    def __init__(self) -> None:
        """There was none."""
        self._last: tuple[str, int] | None = None

    def explain(self, failure: Failure, stage_index: int, step: int) -> str | None:
        """Why another restart would end as this one has, if that is so.

        Args:
            failure: of the gang.
            stage_index: of the stage at hand.
            step: in which it failed.

        Returns:
            What to tell the user; None where a restart may help.
        """
        # Which of the ranks comes first is chance.
        words = failure.text.partition(": ")[2] or failure.text
        this = (f"{stage_index}: {words}", step)
        again = failure.kind is FailureKind.ERROR and this == self._last
        self._last = this if failure.kind is FailureKind.ERROR else None
        if not again:
            return None
        return (
            f"{failure.text}; given up, for it is the same exception in the same step ({step}) as "
            "the time before: a restart does not help"
        )
