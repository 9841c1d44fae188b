"""How a run waits in the line for its workers, and what it says meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from ringworld_platform.gang import Gang
from ringworld_platform.job_ends import JobFailed
from ringworld_platform.job_queue import Answer, JobQueue
from ringworld_platform.live_run import LiveRun
from ringworld_platform.parts import Part
from ringworld_platform.run_state import RunState
from ringworld_platform.scheduler import Demand, Wait

# A shorter wait is not worth telling: the last gang's resources are just coming back.
TELL_SECONDS = 1.0


class Turn:
    """One run's place in the line."""

    def __init__(self, live: LiveRun, line: JobQueue, *, one_shot: bool) -> None:
        """Ask for nothing yet.

        Args:
            live: the run.
            line: of all runs.
            one_shot: what the cluster can never hold fails, instead of waiting for nodes.
        """
        self._live, self._line, self._one_shot = live, line, one_shot
        self._preempted = ""
        self._asked: float | None = None
        """Since when Ray's autoscaler knows of the gang that waits, in monotonic seconds."""

    def lost(self, reason: str) -> None:
        """The run has made way; the next wait says why it stands in line again."""
        self._preempted = f"{reason}; "

    def wait(self, gang: Gang, pause: Callable[[], None], part: Part | None = None) -> None:
        """Wait until it is the run's turn and there is room for the whole gang, and take it.

        Args:
            gang: that wants workers.
            pause: called between two looks; may raise to give up.
            part: that the gang is for, which may do with fewer workers.

        Raises:
            MeshChanged: the stage has waited long enough for the mesh that it wants.
            JobFailed: the workers will never come.
        """
        live, line, run_id = self._live, self._line, self._live.run_id
        record, spec = live.record, gang.spec
        line.ask(Demand(run_id, record.priority, record.submitted, spec.size, spec.bundle))
        began = time.monotonic()
        self._asked = None
        while True:
            answer = line.answer(run_id)
            if (places := answer.places) is not None:
                granted = partial(line.grants, run_id, places)
                if gang.acquire(places, granted) and line.hold(
                    run_id, places, lambda: live.record.eta_seconds
                ):
                    break
                gang.give_back()
            else:
                gang.ask_for_nodes(answer.asks)
                if not answer.asks:
                    self._asked = None
                elif self._asked is None:
                    self._asked = time.monotonic()
                self._tell(answer, spec.size, time.monotonic() - began, part)
            pause()
        self._preempted = ""
        live.set_fields(place=None, start_seconds=None, waiting_since=None)

    def _tell(self, answer: Answer, size: int, waited_seconds: float, part: Part | None) -> None:
        """Say why the gang does not start, or give up where nothing can change."""
        wait, live = answer.wait, self._live
        if wait is None:
            return
        reason = wait.reason
        if part is not None:
            reason = part.waiting(answer.room, reason)
        # What has just ended may be used for seconds more, and a busy machine takes its time.
        if not wait.possible and self._one_shot and answer.room < size:
            raise JobFailed(reason)
        if waited_seconds < TELL_SECONDS:
            return
        reason = self._preempted + reason + self._told_autoscaler(wait)
        state = RunState.WAITING if wait.place == 1 or not wait.possible else RunState.QUEUED
        where = {"place": wait.place, "start_seconds": wait.start_seconds}
        if live.record.waiting_since is None:
            live.set_fields(waiting_since=time.time() - waited_seconds, **where)
            live.set_state(state, reason)
        # What changes all the time is no event, and saved with the next beat only.
        live.show(state=state, reason=reason, **where)

    def _told_autoscaler(self, wait: Wait) -> str:
        """``; asked the autoscaler for 2 nodes 12 s ago``."""
        if self._asked is None:
            return ""
        number = wait.new_nodes or "more"
        nodes = f"{number} node{'' if number == 1 else 's'}"
        return f"; asked the autoscaler for {nodes} {_ago(time.monotonic() - self._asked)}"


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
