"""A run's state in memory beside the one in its folder."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mini_jobs import mini_job, wait_until

from ringworld_platform.capacity import Cluster
from ringworld_platform.drain import DrainWatch
from ringworld_platform.errors import UnknownRunError
from ringworld_platform.job_queue import JobQueue
from ringworld_platform.job_runner import JobRunner
from ringworld_platform.live_run import LiveRun, OwnershipLost, claim, this_owner
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord, RunState
from ringworld_platform.run_states import RunStates, Stored
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.tracking_service import TrackingService


class Watched(RunStates):
    """Looks at the run's status in memory before each write of its state."""

    look: Callable[[], str] | None = None
    seen: list[str]

    def renew(
        self, run_id: str, change: Callable[[JobRecord], JobRecord], last: Stored | None
    ) -> Stored:
        if self.look is not None:
            self.seen.append(self.look())
        return super().renew(run_id, change, last)


@pytest.fixture
def states(tmp_path: Path) -> Watched:
    made = Watched(tmp_path)
    made.seen = []
    return made


@pytest.fixture
def live(states: Watched, tmp_path: Path) -> LiveRun:
    """A run at work, which was asked to stop."""

    def record(run_id: str, path: Path) -> JobRecord:
        place = {"run_folder": str(path), "spec_digest": "d", "num_stages": 2}
        return JobRecord(job="mini", run_id=run_id, **place)

    run_id = states.create("mini", record).run_id
    folder = RunFolder(tmp_path / run_id)
    folder.open("kind: train\n")
    live = LiveRun(claim(states, run_id, "controller"), mini_job(tmp_path), states, folder)
    live.set_state(RunState.RUNNING, "stage 1k on 1 worker", stop_requested=True)
    states.look = lambda: str(live.status()["state"])
    return live


def test_nobody_hears_of_an_end_before_it_is_in_the_folder(states: Watched, live: LiveRun) -> None:
    live.conclude(RunState.STOPPED, "stopped at step 3", None)

    assert states.seen == ["RUNNING"], "a resume at that moment would find it still at work"
    for record in (live.record, states.get(live.run_id)):
        assert (record.state, record.reason) == (RunState.STOPPED, "stopped at step 3")
        assert not record.stop_requested


def test_an_end_keeps_what_has_changed_since_the_last_save(states: Watched, live: LiveRun) -> None:
    live.set_fields(checkpoint="00-1k/step-00000003", step=3)
    live.conclude(RunState.FAILED, "rank 1 fell", "rank 1 fell")

    record = states.get(live.run_id)
    assert (record.checkpoint, record.step, record.error) == (
        "00-1k/step-00000003", 3, "rank 1 fell",
    )  # fmt: skip


def test_a_state_is_json_for_any_reader_after_a_step_that_went_wrong(
    states: Watched, live: LiveRun
) -> None:
    step = {"kind": "step", "stage": "1k", "stage_index": 0, "step": 3, "tokens": 3072}
    live.metrics([{**step, "loss": 2.5}])
    assert live.status()["loss"] == 2.5
    live.metrics([{**step, "loss": math.nan}])
    assert live.status()["loss"] is None
    assert json.loads(json.dumps(live.status(), allow_nan=False))["step"] == 3


class Slow(RunFolder):
    """Takes its time to close."""

    may_close = threading.Event()

    def close(self) -> None:
        self.may_close.wait(60)
        super().close()


@pytest.mark.timeout(300)
def test_a_save_that_reads_nothing_notices_what_others_have_written(
    states: Watched, live: LiveRun
) -> None:
    live.set_fields(stop_requested=False)
    live.save()
    live.save()

    def change(**fields: Any) -> None:
        states.update(live.run_id, lambda found: found.model_copy(update=fields))

    change(stop_requested=True)
    live.save()
    assert live.record.stop_requested

    change(owner=this_owner("another"))
    with pytest.raises(OwnershipLost):
        live.save()
    assert states.get(live.run_id).owner.controller == "another"  # type: ignore[union-attr]

    shutil.rmtree(states.root / live.run_id)
    with pytest.raises(UnknownRunError):
        live.save()
    assert not (states.root / live.run_id).exists(), "not made anew by a save"


def test_a_run_whose_end_was_told_is_not_at_work(live: LiveRun) -> None:
    folder = live.folder = Slow(live.folder.path)
    line, tracking = JobQueue(lambda: Cluster({}, {})), TrackingService()
    runner = JobRunner(live, line, DrainWatch(dict), RunnerConfig(one_shot=True), tracking)

    runner.start()
    try:
        wait_until(lambda: live.status()["state"] == "STOPPED", "it was asked to stop")
        assert not runner.active, "a resume may follow, and waits for the rest"
    finally:
        folder.may_close.set()
    runner.join(60)
    assert live.states.get(live.run_id).state is RunState.STOPPED
