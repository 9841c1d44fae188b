"""A run's state and logs in its store: copied while it runs, restored where its folder is not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from mini_jobs import wait_until
from typer.testing import CliRunner

from ringworld_platform.cli import app
from ringworld_platform.commands import train
from ringworld_platform.errors import PlatformError, RunConflictError, UnknownRunError
from ringworld_platform.live_run import this_owner
from ringworld_platform.run_copy import RunCopy
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_parts import Part, find_parts, lengths, pull
from ringworld_platform.run_state import JobRecord, RunState
from ringworld_platform.run_states import RunStates
from ringworld_platform.store_view import StoreView
from ringworld_platform.stored_run import StoredRun
from ringworld_workers.store.opening import open_store

pytestmark = pytest.mark.timeout(300)

LEASE_SECONDS = 6.0


class Machine:
    """One with a folder of runs of its own, and a controller that has taken a run."""

    def __init__(
        self, root: Path, record: JobRecord, run: StoredRun, lease_seconds: float = 60.0
    ) -> None:
        self.folder = RunFolder(root / record.run_id)
        self.folder.open("kind: train\n")
        self.taken, etag = run.take(record, this_owner(root.name, lease_seconds))
        self.copy = RunCopy(run, self.taken, etag, self.folder.path)
        self.copy.start()

    def step(self, number: int) -> None:
        self.folder.append_metrics([{"kind": "step", "step": number, "sample_ids": ["a"]}])
        self.folder.append_log(1, [f"step {number}"])
        self.folder.append_event("step", f"step {number}")

    def tell(self, **changes: Any) -> None:
        self.copy.tell(self.taken.model_copy(update=changes), hurry=True)


def new_record(root: Path, **fields: Any) -> JobRecord:
    about: dict[str, Any] = {"job": "job", "run_id": "job-1", "run_folder": str(root / "job-1")}
    return JobRecord(
        **about, num_stages=1, spec_digest="d", uid="u", submitted=time.time(), **fields
    )


def lease_is_over(run: StoredRun) -> bool:
    owner = stored(run).owner
    return owner is not None and not owner.alive(time.time())


def parts_of(run: StoredRun) -> list[Part]:
    return find_parts(run.store, run.run_id)


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


@pytest.fixture
def run(s3_url: str) -> StoredRun:
    open_store(s3_url).put("job-1/spec.yaml", [b"kind: train\n"])
    return StoredRun(f"{s3_url}/job-1")


def stored(run: StoredRun) -> JobRecord:
    found = run.read()
    assert found is not None
    return found[0]


def test_what_a_machine_took_with_it_is_in_the_store(tmp_path: Path, run: StoredRun) -> None:
    first = Machine(tmp_path / "first", new_record(tmp_path / "first"), run)
    for number in (1, 2):
        first.step(number)
    first.tell(state=RunState.RUNNING, step=2)
    wait_until(lambda: stored(run).step == 2 and len(parts_of(run)) == 4, "a copy")
    first.step(3)
    (first.folder.path / "mlflow.json").write_text("{}")
    assert first.copy.finish(first.taken.model_copy(update={"step": 3}), 60.0)
    parts = [part for part in parts_of(run) if part.name == "metrics.jsonl"]
    assert [part.epoch for part in parts] == [1, 1] and parts[1].offset == parts[0].size

    restored = run.restore(tmp_path / "second" / "job-1")

    for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl", "logs/rank-1.log"):
        here, there = (tmp_path / where / "job-1" / name for where in ("first", "second"))
        assert here.read_bytes() == there.read_bytes(), name
    assert (tmp_path / "second/job-1/mlflow.json").read_text() == "{}"
    assert (restored.step, restored.owner, restored.epoch) == (3, None, 1)
    assert restored.run_folder == str(tmp_path / "second" / "job-1")
    with pytest.raises(UnknownRunError, match="holds no run's state.json"):
        StoredRun(f"{run.store.url}/job-7").restore(tmp_path / "job-7")

    view = StoreView(run.store.url, tmp_path / "scratch")
    assert [run["run_id"] for run in view.list()] == ["job-1"]
    assert view.logs("job", rank=1).items == ["step 1", "step 2", "step 3"]
    assert f"`ringworld resume {run.url}` continues it" in view.status("job-1")["reason"]
    # What `ringworld resume` takes for a run of a store, and what for one of this machine.
    assert train._run_url(run.url, None) == train._run_url("job", run.store.url) == run.url
    assert train._run_url("job", None) is None
    shown = CliRunner().invoke(app, ["list", "--store", run.store.url, "--json"])
    assert [run["step"] for run in json.loads(shown.output)] == [3], shown.output
    shown = CliRunner().invoke(app, ["status", run.url, "--json"])
    assert json.loads(shown.output)["run_id"] == "job-1", shown.output
    shown = CliRunner().invoke(app, ["events", run.url, "--json"])
    assert [json.loads(line)["text"] for line in shown.output.splitlines()] == [
        f"step {number}" for number in (1, 2, 3)
    ], shown.output
    shown = CliRunner().invoke(app, ["logs", run.url, "--tail", "2"])
    assert shown.output.splitlines()[-2:] == ["step 2", "step 3"], shown.output
    picture = tmp_path / "watch.svg"
    shown = CliRunner().invoke(app, ["watch", run.url, "--svg", str(picture)])
    assert shown.exit_code == 0 and "job-1" in picture.read_text(), shown.output


def test_a_controller_that_lost_its_lease_lets_go_and_writes_no_more(
    tmp_path: Path, run: StoredRun
) -> None:
    first = Machine(tmp_path / "first", new_record(tmp_path / "first"), run, LEASE_SECONDS)
    first.step(1)
    first.tell(step=1)
    wait_until(lambda: stored(run).step == 1, "a copy")
    elsewhere = run.restore(tmp_path / "second" / "job-1")
    with pytest.raises(RunConflictError, match="run by another controller .process"):
        Machine(tmp_path / "second", elsewhere, run)
    # As if it were frozen: its thread sees nothing, while the lease runs out.
    with first.copy._lock:
        wait_until(lambda: lease_is_over(run), "the lease has run out")
        second = Machine(tmp_path / "second", elsewhere, run)
        first.step(2)
        second.step(20)
        second.tell(step=20)
        wait_until(lambda: stored(run).step == 20, "the second's state")
        # Its logs follow its state.
        whose = lambda: {part.epoch for part in parts_of(run) if part.name == "metrics.jsonl"}  # noqa: E731
        wait_until(lambda: 2 in whose(), "the second's copy")

    wait_until(lambda: first.copy.taken_by is not None, "the first hears of it")

    assert first.copy.taken_by is not None and first.copy.taken_by.controller == "second"
    assert not first.copy.finish(first.taken.model_copy(update={"step": 99}), 5.0)
    assert (stored(run).step, stored(run).epoch) == (20, 2)
    # A piece that the first had been about to write: it does not count.
    last = second.folder.metrics()
    data = b'{"kind": "step", "step": 2}\n' * 9
    late = Part("metrics.jsonl", 1, lengths(parts_of(run))["metrics.jsonl"] // 2)
    run.store.put(run.key(late.key), [data])
    pull(run.store, run.run_id, first.folder.path)
    assert steps_in(first.folder.path) == [1, 20] == [r["step"] for r in last.items]
    assert second.copy.finish(second.taken, 60.0)


def test_a_store_that_is_away_keeps_nobody_waiting(tmp_path: Path, run: StoredRun) -> None:
    only = Machine(tmp_path / "only", new_record(tmp_path / "only"), run, LEASE_SECONDS)
    right, only.copy._run = only.copy._run, StoredRun("s3://nowhere/job-1")
    began = time.monotonic()
    only.step(1)
    only.tell(step=1)
    assert time.monotonic() - began < 5.0, "a store is asked for ten seconds"
    wait_until(lambda: only.copy.problem is not None, "it is noticed")
    assert only.copy.taken_by is None, "nobody has it: it goes on"
    wait_until(lambda: lease_is_over(run), "the lease has run out")
    assert not only.copy._may_write(), "others may have taken it"

    only.copy._run = right
    wait_until(lambda: only.copy.problem is None, "it is back")
    assert only.copy.finish(only.taken.model_copy(update={"step": 1}), 60.0)
    assert stored(run).step == 1 and steps_in(only.folder.path) == [1]


def test_another_run_of_that_name_is_not_touched(tmp_path: Path, run: StoredRun) -> None:
    run.take(new_record(tmp_path), this_owner("one"))
    stranger = new_record(tmp_path / "other").model_copy(update={"uid": "another"})
    with pytest.raises(RunConflictError, match="another run of this name"):
        run.refreshed(stranger)
    with pytest.raises(RunConflictError, match="another run of this name"):
        run.take(stranger, this_owner("two"))
    run.store.put("job-1/state.json", [b"[]"])
    with pytest.raises(PlatformError, match="state.json is not a run's state"):
        run.read()


def test_a_log_that_went_on_here_stays_and_one_that_went_another_way_does_not(
    tmp_path: Path, run: StoredRun
) -> None:
    put = run.store.put
    put(run.key(Part("metrics.jsonl", 1, 0).key), [b"one\n"])
    put(run.key(Part("events.jsonl", 1, 0).key), [b"one\n"])
    put(run.key(Part("events.jsonl", 1, 40).key), [b"after a gap\n"])
    put(run.key("records/evil-0001-000000000000.jsonl"), [b"no log of a run\n"])
    (tmp_path / "metrics.jsonl").write_bytes(b"one\ntwo\n")
    (tmp_path / "events.jsonl").write_bytes(b"other\nlines\n")

    pull(run.store, run.run_id, tmp_path)

    assert (tmp_path / "metrics.jsonl").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "events.jsonl").read_bytes() == b"one\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_a_moved_run_says_where_it_is(tmp_path: Path) -> None:
    states = RunStates(tmp_path)
    record = new_record(tmp_path, store="s3://b0b/x/job-1", moved_to="process 7 on far has it")
    record.state = RunState.RUNNING
    states.keep(record)
    assert not record.abandoned(), "no controller here takes it up"
    reason = states.get("job-1").to_status()["reason"]
    assert reason.startswith("goes on elsewhere: process 7 on far has it; `ringworld status s3:")
