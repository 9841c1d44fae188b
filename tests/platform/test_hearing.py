"""What a gang says, in its run's state and logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mini_jobs import mini_job

from ringworld_platform.drain import DrainWatch, Warnings
from ringworld_platform.hearing import Hearing
from ringworld_platform.live_run import LiveRun
from ringworld_platform.rhythm import Rhythm
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord, WorkerRow
from ringworld_platform.run_states import RunStates
from ringworld_workers.recorder import Entry, Progress


def hearing_of(live: LiveRun) -> Hearing:
    return Hearing(
        live,
        Warnings(DrainWatch(dict)),
        tick=lambda: None,
        heed=lambda notice: None,
        rhythm=Rhythm,
    )


def live_run(tmp_path: Path, recipe: str | None = None, **fields: Any) -> LiveRun:
    folder = RunFolder(tmp_path / "mini-1")
    folder.open("kind: train\n")
    about = {"run_folder": str(folder.path), "spec_digest": "d", **fields}
    record = JobRecord(job="mini", run_id="mini-1", num_stages=2, **about)
    return LiveRun(record, mini_job(tmp_path, recipe=recipe), RunStates(tmp_path), folder)


def test_a_heartbeat_shows_where_a_rank_is_and_an_event_where_the_run_is(tmp_path: Path) -> None:
    live = live_run(tmp_path, stage="4k", step=7, attempt=2)
    live.record.workers = [WorkerRow(rank=r, pid=r, node="n", device="cpu") for r in range(2)]
    hearing = hearing_of(live)

    hearing.progress(1, Progress("forward", 8, 5.0, 3, hop=2, awaits=0, memory_bytes=9))
    figures = {"kind": "step", "step": 8, "step_seconds": 1.0, "ring_compute_by_rank": [0.5, 0.25]}
    told = {"text": "hello", "kind": "worker", "time": 1.0}
    hearing.entries(0, [Entry(1, "metrics", figures), Entry(2, "event", told)])

    row = live.record.workers[1]
    assert (row.phase, row.step, row.since, row.hop, row.awaits) == ("forward", 8, 5.0, 2, 0)
    assert (row.memory_bytes, row.compute_seconds) == (9, 0.25)
    (event,) = live.folder.events()
    assert (event["stage"], event["step"], event["attempt"], event["rank"]) == ("4k", 7, 2, 0)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [(None, "stage 1k on 1 worker"), ("recipe.yaml", "preparing data: write clips 2/3")],
)
def test_only_a_build_of_data_is_shown_as_one(
    tmp_path: Path, recipe: str | None, reason: str
) -> None:
    live = live_run(tmp_path, recipe, reason="stage 1k on 1 worker")
    hearing = hearing_of(live)

    hearing.progress(0, Progress("write clips 2/3", 2, 0.0, 1))

    assert live.record.reason == reason
