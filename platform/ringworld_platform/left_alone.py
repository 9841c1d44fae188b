"""A run that nobody goes on with: to follow it would be to wait for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

from ringworld_platform.run_records import Record

GRACE_SECONDS = 10.0
"""A run has no controller for a moment between its submission and its first gang, say, and while
Ray starts its controller anew."""


class LeftAlone:
    """Looks at the status of one run, again and again."""

    def __init__(
        self, grace_seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing was seen yet.

        Args:
            grace_seconds: for so long a run may be without a controller; None: the usual time.
            clock: monotonic seconds.
        """
        self._grace = GRACE_SECONDS if grace_seconds is None else grace_seconds
        self._clock = clock
        self._since: float | None = None

    def seen(self, status: Record) -> bool:
        """Whether nobody goes on with it here, and that for a while; its ``reason`` has a remedy.

        Args:
            status: of the run, as it is now.
        """
        if not status.get("left"):
            self._since = None
            return False
        now = self._clock()
        if self._since is None:
            self._since = now
        return now - self._since >= self._grace


def farewell(status: Record) -> str:
    """What to say of such a run where following it ends."""
    return f"{status['run_id']} has not ended, and is followed no longer: {status['reason']}"
