"""Run state under races, and the run folder after crashes."""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ringworld_platform.errors import (
    PlatformError,
    RunConflictError,
    RunFolderError,
    UnknownRunError,
)
from ringworld_platform.live_run import claim, this_owner
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_records import STATE_FILE
from ringworld_platform.run_state import LEASE_SECONDS, JobRecord, Owner, RunState
from ringworld_platform.run_states import RunStates


def record(run_id: str, path: Path, job: str = "job", submitted: float = 0.0) -> JobRecord:
    return JobRecord(
        job=job,
        run_id=run_id,
        num_stages=1,
        run_folder=str(path),
        spec_digest="d",
        submitted=submitted,
    )


def test_ids_are_given_out_once_under_a_race(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def create(_: int) -> str:
        start.wait(10)
        return RunStates(tmp_path).create("job", record).run_id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(create, range(8)))

    assert sorted(ids) == sorted(f"job-{n}" for n in range(1, 9))


def test_no_update_is_lost_under_a_race(tmp_path: Path) -> None:
    run_id = RunStates(tmp_path).create("job", record).run_id
    start = threading.Barrier(4)

    def one_more(found: JobRecord) -> JobRecord:
        found.step += 1
        return found

    def work(_: int) -> None:
        states = RunStates(tmp_path)
        start.wait(10)
        for _ in range(10):
            states.update(run_id, one_more)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

    assert RunStates(tmp_path).get(run_id).step == 40


def test_states_that_stand_are_not_read_again_and_those_that_change_are(tmp_path: Path) -> None:
    states = RunStates(tmp_path)
    run_id = states.create("job", record).run_id
    path = tmp_path / run_id / STATE_FILE
    old, young = path.read_text(), path.read_text().replace('"step": 0', '"step": 7')
    assert old != young

    states.all()
    path.write_text(young)
    assert states.all()[0].step == 7, "its stamp may be the same, but it was too young to trust"

    long_ago = time.time() - 60
    os.utime(path, (long_ago, long_ago))
    states.all()[0].step = 9
    path.write_text(old)
    os.utime(path, (long_ago, long_ago))
    assert states.all()[0].step == 7, "remembered, and no caller has changed it"

    other = RunStates(tmp_path)
    other.update(run_id, lambda found: found.model_copy(update={"step": 8}))
    assert states.all()[0].step == 8
    other.forget(run_id)
    assert states.all() == []


def test_a_list_of_runs_asks_who_knows_them_better_and_shares_nothing(tmp_path: Path) -> None:
    states = RunStates(tmp_path)
    ended, waits, works = (states.create("job", record).run_id for _ in range(3))
    failed = {"state": RunState.FAILED, "reason": "no room"}
    states.update(ended, lambda found: found.model_copy(update=failed))
    long_ago = time.time() - 60
    os.utime(tmp_path / ended / STATE_FILE, (long_ago, long_ago))
    known = {works: {**states.get(works).to_status(), "step": 7}}

    for _ in range(2):
        found = states.statuses(known.get)
        assert [status["run_id"] for status in found] == [ended, waits, works]
        assert found[0]["reason"] == "no room", "as it stands, whatever was done to an answer"
        assert found[2]["step"] == 7
        found[0]["reason"] = "spoilt"

    states.update(ended, lambda found: found.model_copy(update={"state": RunState.STOPPED}))
    assert states.statuses(known.get)[0]["state"] == "STOPPED"


def test_of_two_controllers_one_claims_a_run(tmp_path: Path) -> None:
    states = RunStates(tmp_path)
    run_id = states.create("job", record).run_id
    start = threading.Barrier(2)

    def take(controller: str) -> str | None:
        start.wait(10)
        try:
            claim(states, run_id, controller)
        except RunConflictError:
            return None
        return controller

    with ThreadPoolExecutor(2) as pool:
        winners = [name for name in pool.map(take, ["a", "b"]) if name]

    owner = states.get(run_id).owner
    assert owner is not None
    assert winners == [owner.controller]


def test_an_owner_that_died_is_known_to_be_gone() -> None:
    here = this_owner("c")
    assert here.alive(here.beat)
    assert not here.alive(here.beat + LEASE_SECONDS + 1)
    dead = Owner(controller="c", host=socket.gethostname(), pid=2**22 + 1, beat=here.beat)
    assert not dead.alive(here.beat)
    elsewhere = Owner(controller="c", host="other", pid=1, beat=here.beat)
    assert elsewhere.alive(here.beat)


def test_a_run_without_its_controller_does_not_claim_to_run(tmp_path: Path) -> None:
    found = record("job-1", tmp_path)
    found.state = RunState.RUNNING
    assert "ringworld resume job-1" in found.to_status()["reason"]
    found.owner = this_owner("c")
    found.reason = "stage 1k"
    status = found.to_status()
    assert (status["state"], status["reason"]) == ("RUNNING", "stage 1k")
    assert not {"owner", "spec_digest", "prepared"} & status.keys()


def test_find_takes_run_ids_and_job_names(tmp_path: Path) -> None:
    states = RunStates(tmp_path)
    states.create("job", lambda run_id, path: record(run_id, path, submitted=1.0))
    states.create("job", lambda run_id, path: record(run_id, path, submitted=2.0))
    states.create("job-1", lambda run_id, path: record(run_id, path, "job-1", 3.0))
    (tmp_path / "not-a-run").mkdir()

    assert states.find("job").run_id == "job-2"
    assert states.find("job-1").run_id == "job-1"
    assert states.find("job-1").job == "job"
    assert states.find("job-1-1").job == "job-1"
    with pytest.raises(UnknownRunError, match="the latest are: job-1, job-2, job-1-1"):
        states.find("nope")
    with pytest.raises(UnknownRunError, match="no run or job"):
        states.find(str(states.root / "job-1"))


def test_folder_mends_torn_lines_and_goes_on_counting(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "job-1")
    folder.open("name: job\n")
    folder.append_event("state", "one")
    folder.append_metrics([{"kind": "step", "stage": "s", "step": 1, "sample_ids": ["a"]}])
    folder.append_log(0, ["first"])
    folder.close()
    for name in ("events.jsonl", "metrics.jsonl", "logs/rank-0.log"):
        with (folder.path / name).open("ab") as file:
            file.write(b'{"torn')

    again = RunFolder(tmp_path / "job-1")
    again.open("name: other\n")
    again.append_event("state", "two")
    again.append_metrics([{"kind": "step", "stage": "s", "step": 2}])
    again.append_log(0, ["second"])

    assert [(e["seq"], e["text"]) for e in again.events()] == [(1, "one"), (2, "two")]
    assert [e["seq"] for e in again.events(after=1)] == [2]
    page = again.metrics()
    assert [r["step"] for r in page.items] == [1, 2]
    assert again.metrics(page.next).items == []
    assert again.log(0).items == ["first", "second"]
    assert (folder.path / "spec.yaml").read_text() == "name: job\n"
    assert json.loads((folder.path / "samples.jsonl").read_text())["sample_ids"] == ["a"]


def test_logs_are_strict_json_whatever_a_figure_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "job-1")
    folder.open("name: job\n")
    odd = {"loss": math.nan, "grad_norm": -math.inf, "ring": {"wait": [math.inf, 1.5]}}
    folder.append_metrics([{"kind": "step", "stage": "s", "step": 1, **odd}])
    folder.append_event("gate", "it is nan", figure=math.nan)
    folder.append_answers("evaluations/00-s.jsonl", [{"kind": "answer", "nll": math.nan}])

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    def strict(name: str) -> dict[str, Any]:
        text = (folder.path / name).read_text(encoding="utf-8")
        return dict(json.loads(text, parse_constant=refuse))

    found = {"loss": None, "grad_norm": None, "ring": {"wait": [None, 1.5]}}
    assert strict("metrics.jsonl") == {"kind": "step", "stage": "s", "step": 1, **found}
    assert strict("events.jsonl")["figure"] is None
    assert strict("evaluations/00-s.jsonl")["nll"] is None


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "job-1").write_text("a file where the folder should be")
    with pytest.raises(RunFolderError, match="cannot write the run folder .*job-1"):
        RunFolder(tmp_path / "job-1").open("")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "job-1")
    folder.open("")
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match="No space left on device; free space"):
        folder.append_metrics([{"kind": "step", "step": 1}])


def test_what_a_full_disk_cut_off_spoils_no_later_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "job-1")
    folder.open("")
    folder.append_metrics([{"kind": "step", "step": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a write takes what fits, then fails
    try:
        with pytest.raises(RunFolderError, match="cannot write the run folder"):
            folder.append_metrics([{"kind": "step", "step": 2, "padding": "x" * 8000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    folder.append_metrics([{"kind": "step", "step": 3}])

    assert [record["step"] for record in folder.metrics().items] == [1, 3]


def test_a_spec_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunFolderError, match="cannot write the run folder"):
            RunFolder(tmp_path / "job-1").open("name: job\n" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    RunFolder(tmp_path / "job-1").open()
    assert not (tmp_path / "job-1" / "spec.yaml").exists()

    RunFolder(tmp_path / "job-1").open("name: job\n")

    assert (tmp_path / "job-1" / "spec.yaml").read_text() == "name: job\n"


def test_an_unwritable_store_is_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PlatformError, match="a part of the path is a file"):
        RunStates(tmp_path / "file" / "runs").create("job", record)
