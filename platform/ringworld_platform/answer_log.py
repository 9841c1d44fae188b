"""Answers of a model as its gang gives them: into the run's folder, and counted in its state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ringworld_platform.evaluation_records import answers_file
from ringworld_platform.live_run import LiveRun
from ringworld_platform.own_answers import TASK
from ringworld_platform.run_records import Record
from ringworld_platform.run_state import RunState

BEGIN = "evaluation_start"
"""Kind of the event with which a gang begins a task: ``task``, ``items``, ``answered``."""


class AnswerLog:
    """Hears the answers of one run's gangs."""

    def __init__(self, live: LiveRun) -> None:
        """Hear nothing yet."""
        self._live = live
        self._gang = (0, "")
        """Attempt, and stage: stages that run at the first attempt share its number."""
        self._given: Counter[str] = Counter()
        """By task, answers of the present gang."""
        self._task, self._items, self._before = "", 0, 0

    def begin(self, event: Record) -> None:
        """The gang begins a task, or goes on with it."""
        self._see_gang()
        self._task = str(event.get("task"))
        self._items, self._before = int(event["items"]), int(event["answered"])
        self._show()

    def hear(self, answers: Sequence[Record]) -> None:
        """Keep answers. From here on their items are not asked again."""
        live = self._live
        by_file: dict[str, list[Record]] = {}
        for answer in answers:
            name = answers_file(int(answer["stage_index"]), str(answer["stage"]))
            by_file.setdefault(name, []).append(answer)
        for name, mine in by_file.items():
            live.folder.append_answers(name, mine)
        if answers:
            self._see_gang()
            self._given.update(str(answer["task"]) for answer in answers)
            # Progress: the restart budget is full again.
            live.set_fields(restarts=0)
            self._show()

    def _see_gang(self) -> None:
        record = self._live.record
        if (gang := (record.attempt, record.stage)) != self._gang:
            self._gang = gang
            self._given.clear()

    def _show(self) -> None:
        record = self._live.record
        if not self._task or record.state is not RunState.RUNNING:
            return
        done = self._before + self._given[self._task]
        what = "answering prompts" if self._task == TASK else f"evaluating {self._task}"
        self._live.set_fields(reason=f"{what} {done}/{self._items} of {record.stage}")
