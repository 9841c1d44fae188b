"""What a gang says, in its run's state and logs."""

from __future__ import annotations

from pathlib import Path

import pytest
from mini_jobs import mini_job

from ringworld_platform.drain import DrainWatch, Warnings
from ringworld_platform.hearing import Hearing
from ringworld_platform.live_run import LiveRun
from ringworld_platform.rhythm import Rhythm
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord, RunStates
from ringworld_workers.recorder import Progress


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [(None, "stage 1k on 1 worker"), ("recipe.yaml", "preparing data: write clips 2/3")],
)
def test_only_a_build_of_data_is_shown_as_one(
    tmp_path: Path, recipe: str | None, reason: str
) -> None:
    folder = RunFolder(tmp_path / "mini-1")
    folder.open("kind: train\n")
    about = {"run_folder": str(folder.path), "spec_digest": "d", "reason": "stage 1k on 1 worker"}
    record = JobRecord(job="mini", run_id="mini-1", num_stages=2, **about)
    live = LiveRun(record, mini_job(tmp_path, recipe=recipe), RunStates(tmp_path), folder)
    hearing = Hearing(
        live,
        Warnings(DrainWatch(dict)),
        tick=lambda: None,
        heed=lambda notice: None,
        rhythm=Rhythm,
    )

    hearing.progress(0, Progress("write clips 2/3", 2, 0.0, 1))

    assert live.record.reason == reason
