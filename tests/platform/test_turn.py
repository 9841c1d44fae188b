"""How a run waits for its workers on a cluster that has just been used by another gang."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest
from mini_jobs import mini_job

from ringworld_platform.capacity import Cluster, NodeRoom
from ringworld_platform.gang import Gang, GangSpec
from ringworld_platform.job_ends import JobFailed
from ringworld_platform.job_queue import FOREIGN_SECONDS, JobQueue
from ringworld_platform.live_run import LiveRun, claim
from ringworld_platform.room import Bundle, Places, Room
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord
from ringworld_platform.run_states import RunStates
from ringworld_platform.turn import Turn


class Wanting:
    """A gang of two that has not started."""

    def __init__(self, size: int) -> None:
        self.spec = GangSpec(name="mini/a", size=size, bundle=Bundle(1), **FUNCTIONS)
        self.got: Places | None = None

    def acquire(self, places: Places, granted: Any) -> bool:
        self.got = places
        return True

    def ask_for_nodes(self, wanted: bool) -> None:
        pass


FUNCTIONS: dict[str, Any] = {"stage_function": "a:b", "prepare_function": "a:b"}


@pytest.fixture
def live(tmp_path: Path) -> LiveRun:
    states = RunStates(tmp_path)

    def record(run_id: str, path: Path) -> JobRecord:
        place = {"run_folder": str(path), "spec_digest": "d", "num_stages": 1}
        return JobRecord(job="mini", run_id=run_id, submitted=time.time(), **place)

    run_id = states.create("mini", record).run_id
    RunFolder(tmp_path / run_id).open("kind: train\n")
    folder = RunFolder(tmp_path / run_id)
    return LiveRun(claim(states, run_id, "me"), mini_job(tmp_path), states, folder)


def test_what_has_just_ended_does_not_end_a_run_that_fits(live: LiveRun) -> None:
    """Ray may count a gang's CPUs as used for longer than others' are given the doubt."""
    now, free = [0.0], [1.0]
    line = JobQueue(lambda: Cluster({"n": NodeRoom(Room(2), Room(free[0]))}, {}), lambda: now[0])
    gang = Wanting(2)
    while now[0] <= 2 * FOREIGN_SECONDS:  # so that what is used is another's
        now[0] += 1.0
        line.room(Bundle(1))

    def pause() -> None:
        now[0] += 1.0
        if now[0] > 4 * FOREIGN_SECONDS:
            free[0] = 2.0
        assert now[0] < 60, "the workers are free"

    Turn(live, line, one_shot=True).wait(cast(Gang, gang), pause)
    assert gang.got == {"n": 2} and now[0] > 4 * FOREIGN_SECONDS


def test_what_the_nodes_can_never_hold_ends_a_command_at_once(live: LiveRun) -> None:
    line = JobQueue(lambda: Cluster({"n": NodeRoom(Room(2), Room(2))}, {}))
    with pytest.raises(JobFailed, match="needs 3 CPU bundles"):
        Turn(live, line, one_shot=True).wait(cast(Gang, Wanting(3)), lambda: None)
