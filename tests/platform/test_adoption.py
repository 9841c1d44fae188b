"""Calls that are made twice, runs that were left, and the list of where they are. Without Ray."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mini_jobs import mini_job
from rival import Rival

from ringworld_jobs.resolve import resolved_yaml, spec_digest
from ringworld_platform.client import absolute_paths
from ringworld_platform.controller import ControllerConfig
from ringworld_platform.errors import RunConflictError
from ringworld_platform.going_on import unfinished
from ringworld_platform.live_run import this_owner
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord, Owner, RunState
from ringworld_platform.run_states import RunStates
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.runs_roots import RootList
from ringworld_platform.settling import settle
from ringworld_platform.stored_run import StoredRun

GONE = Owner(controller="gone", host=socket.gethostname(), pid=2**22 + 1, beat=0.0)


def a_run(root: Path, state: RunState = RunState.RUNNING, owner: Owner | None = GONE) -> JobRecord:
    """A run of ``mini_job`` as a controller leaves it."""
    spec = absolute_paths(mini_job(root), root)

    def record(run_id: str, path: Path) -> JobRecord:
        digest = spec_digest(spec)
        found = JobRecord(
            job="mini", run_id=run_id, run_folder=str(path), num_stages=2, spec_digest=digest
        )
        return found.model_copy(update={"state": state, "owner": owner})

    made = RunStates(root).create("mini", record)
    RunFolder(Path(made.run_folder)).open(resolved_yaml(spec))
    return made


def controller(root: Path, name: str = "new", *, one_shot: bool = True, roots: str = "") -> Rival:
    return Rival(ControllerConfig(name, str(root), RunnerConfig(one_shot=one_shot), roots))


def test_a_resume_that_is_asked_for_twice_is_one(tmp_path: Path) -> None:
    run_id = a_run(tmp_path, RunState.FAILED).run_id
    me = controller(tmp_path)

    assert me.resume(run_id, request="first") == run_id
    assert me.resume(run_id, request="first") == run_id, "the answer was lost, not the call"
    with pytest.raises(RunConflictError, match="it needs no resume"):
        me.resume(run_id, request="second")


def test_a_submission_that_is_made_twice_is_one_even_if_the_run_has_ended(tmp_path: Path) -> None:
    me = controller(tmp_path)
    spec = absolute_paths(mini_job(tmp_path), tmp_path).model_dump(mode="json", exclude_none=True)
    run_id = me.submit(spec, str(tmp_path), "first")

    def ended(record: JobRecord) -> JobRecord:
        record.state = RunState.SUCCEEDED
        return record

    RunStates(tmp_path).update(run_id, ended)

    assert me.submit(spec, str(tmp_path), "first") == run_id
    assert me.submit(spec, str(tmp_path), "second") == "mini-2"


def test_a_new_clusters_controller_takes_up_what_the_last_one_left(tmp_path: Path) -> None:
    roots = tmp_path / "home" / "runs.json"
    first, second = tmp_path / "first", tmp_path / "second"
    for root in (first, second, first):
        RootList(roots).add(root)
    left = [a_run(root) for root in (first, second)]
    a_run(first, RunState.SUCCEEDED, None)
    a_run(first, owner=this_owner("somebody alive"))
    assert [(r.run_id, r.run_folder) for r in unfinished(str(roots))] == [
        (record.run_id, record.run_folder) for record in left
    ]

    me = controller(tmp_path / "third", one_shot=False, roots=str(roots))
    me._closing.set()

    for record, root in zip(left, (first, second), strict=True):
        found = RunStates(root).get(record.run_id)
        assert found.owner is not None and found.owner.controller == "new"
        assert {status["run_id"] for status in me.runs()} >= {record.run_id}
    assert unfinished(str(roots)) == []
    # One that a single command made takes up nothing unasked.
    alone = a_run(second)
    controller(second, "single")
    assert RunStates(second).get(alone.run_id).abandoned()


def test_no_folder_is_lost_when_several_are_added_at_once(tmp_path: Path) -> None:
    names = [tmp_path / str(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda root: RootList(tmp_path / "runs.json").add(root), names))

    assert sorted(RootList(tmp_path / "runs.json").all()) == names
    (tmp_path / "runs.json").write_text("no JSON")
    assert RootList(tmp_path / "runs.json").all() == []
    RootList(tmp_path / "runs.json").add(names[0])
    assert RootList(tmp_path / "runs.json").all() == names[:1]


def test_ctrl_c_twice_leaves_a_stopped_run(tmp_path: Path) -> None:
    states = RunStates(tmp_path)

    def asked(record: JobRecord) -> JobRecord:
        record.state, record.stop_requested = RunState.STOPPING, True
        return record

    ended, alive, unasked = a_run(tmp_path), a_run(tmp_path, owner=this_owner("c")), a_run(tmp_path)
    for record in (ended, alive):
        states.update(record.run_id, asked)

    for record in (ended, alive, unasked):
        settle(tmp_path, record.run_id)
    settle(tmp_path, "no-such-run")

    assert states.get(ended.run_id).state is RunState.STOPPED
    assert not states.get(ended.run_id).stop_requested
    assert states.get(alive.run_id).state is RunState.STOPPING, "its controller is at it"
    assert states.get(unasked.run_id).abandoned(), "it was killed, not stopped"


def test_a_store_that_was_away_at_the_end_hears_of_it_from_a_resume(tmp_path: Path) -> None:
    record = a_run(tmp_path, RunState.SUCCEEDED, None)
    run = StoredRun(f"file://{tmp_path}/store/{record.run_id}")

    def at_the_end(record: JobRecord) -> JobRecord:
        record.store, record.epoch = run.url, 1
        return record

    ended = RunStates(tmp_path).update(record.run_id, at_the_end)
    run.write(ended.model_copy(update={"state": RunState.RUNNING}), None)

    with pytest.raises(RunConflictError, match="has succeeded"):
        controller(tmp_path).resume(record.run_id)

    heard = run.read()
    assert heard is not None and heard[0].state is RunState.SUCCEEDED
