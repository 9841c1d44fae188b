"""Controllers in processes of their own that want the same run, or submit the same job, at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mini_jobs import HERE, worker_environment

from ringworld_platform.local_s3 import LocalS3
from ringworld_platform.run_state import JobRecord
from ringworld_platform.run_states import RunStates
from ringworld_platform.stored_run import StoredRun, runs_in

pytestmark = pytest.mark.timeout(300)

ROUNDS = 4


class Rivals:
    """Three controllers that are asked the same thing at the same moment."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._all = [
            subprocess.Popen(
                [sys.executable, str(HERE / "rival.py"), f"rival-{number}", str(folder)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(3)
        ]
        for rival in self._all:
            assert self._answer(rival) == "ready"

    def ask(self, **what: Any) -> list[dict[str, str]]:
        """Their answers, in the order of the rivals."""
        for rival in self._all:
            assert rival.stdin is not None
            rival.stdin.write(json.dumps(what, default=str) + "\n")
            rival.stdin.flush()
        return [self._answer(rival) for rival in self._all]

    def close(self) -> None:
        for rival in self._all:
            rival.kill()
            rival.communicate(timeout=60)

    @staticmethod
    def _answer(rival: subprocess.Popen[str]) -> Any:
        assert rival.stdout is not None
        return json.loads(rival.stdout.readline())


@pytest.fixture(scope="module")
def rivals(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rivals]:
    folder = tmp_path_factory.mktemp("rivals")
    environment = {**s3_server.environment(), **worker_environment(), "HOME": str(folder)}
    made = Rivals(folder, environment)
    yield made
    made.close()


def a_run(root: Path) -> JobRecord:
    def record(run_id: str, path: Path) -> JobRecord:
        about: dict[str, Any] = {"job": "job", "run_id": run_id, "run_folder": str(path)}
        return JobRecord(**about, num_stages=1, spec_digest="d", uid="u", submitted=time.time())

    return RunStates(root).create("job", record)


def test_one_of_them_takes_a_run(rivals: Rivals, tmp_path: Path, s3_url: str) -> None:
    for turn in range(ROUNDS):
        run = a_run(tmp_path)
        here = rivals.ask(do="claim", root=tmp_path, run_id=run.run_id)
        there = rivals.ask(do="take", root=tmp_path, run_id=run.run_id, store=s3_url)

        owner = RunStates(tmp_path).get(run.run_id).owner
        stored = StoredRun(f"{s3_url}/{run.run_id}").read()
        assert owner is not None and stored is not None and stored[0].owner is not None
        assert [a["done"] for a in here if "done" in a] == [owner.controller], turn
        assert [a["done"] for a in there if "done" in a] == [stored[0].owner.controller], turn
        assert stored[0].epoch == 1
        for refused in (a["refused"] for a in [*here, *there] if "refused" in a):
            assert "is run by another controller" in refused or "taken by process" in refused


@pytest.mark.parametrize("where", ["one folder", "machines that share a store"])
def test_a_job_that_is_submitted_at_once_is_one_run(
    rivals: Rivals, where: str, tmp_path: Path, s3_url: str
) -> None:
    apart = where != "one folder"
    store = s3_url if apart else f"file://{tmp_path}"
    for turn in range(2 if apart else ROUNDS):
        job = f"job{turn}"
        answers = rivals.ask(do="submit", root=tmp_path, job=job, store=store, apart=apart)

        done = [answer["done"] for answer in answers if "done" in answer]
        refused = [answer["refused"] for answer in answers if "refused" in answer]
        assert len(done) == 1 and len(refused) == 2, answers
        assert all("a run of this very job" in told for told in refused), refused
        folders = tmp_path.glob("rival-*") if apart else [tmp_path]
        runs = [run for folder in folders for run in RunStates(folder).all() if run.job == job]
        assert [run.run_id for run in runs] == done
        if apart:
            assert [run.run_id for run in runs_in(s3_url, job) if run.read()] == done
