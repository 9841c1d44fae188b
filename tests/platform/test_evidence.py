"""Evidence is kept where it can be, and never in the way of a restart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ringworld_platform.evidence import Evidence, RankFacts, keep, save
from ringworld_platform.evidence_folder import KEPT_ATTEMPTS
from ringworld_platform.first_cause import raised
from ringworld_platform.run_state import JobRecord
from ringworld_workers.actor import WorkerFailure
from ringworld_workers.stacks import look_at_process

# A file's name in bytes that are no UTF-8, as Python holds it.
NAME = os.fsdecode(b"caf\xe9.py")


def kept(run_folder: Path, attempt: int = 2) -> tuple[JobRecord, str | None]:
    error = WorkerFailure(("RuntimeError",), f"cannot read {NAME}", f"in {NAME}", 1.0)
    failure = raised(0, error).failure
    record = JobRecord(
        job="mini", run_id="mini-1", num_stages=1, attempt=attempt, run_folder="", spec_digest="d",
        error=failure.text,
    )  # fmt: skip
    evidence = Evidence([RankFacts(0)], {0: failure.details}, [])
    return record, save(run_folder, record, failure, evidence)


def test_names_that_are_no_text_are_no_obstacle(tmp_path: Path) -> None:
    record, first = kept(tmp_path)
    assert first == "evidence/attempt-2-error"
    assert kept(tmp_path)[1] == "evidence/attempt-2-error-2", "both are kept"
    told = json.loads((tmp_path / first / "failure.json").read_text())
    assert told["text"] == "rank 0: RuntimeError: cannot read caf?.py"
    assert "in caf?.py" in (tmp_path / first / "stacks.txt").read_text()
    assert JobRecord.model_validate_json(record.model_dump_json()).error == told["text"]


def test_a_folder_that_takes_nothing_costs_the_evidence_only(tmp_path: Path) -> None:
    (tmp_path / "evidence").touch()
    assert kept(tmp_path)[1] is None


def test_the_newest_attempts_alone_keep_their_evidence(tmp_path: Path) -> None:
    for attempt in range(1, KEPT_ATTEMPTS + 4):
        keep(tmp_path, f"attempt-{attempt}-step-00000003-nan", {})
        assert kept(tmp_path, attempt)[1] == f"evidence/attempt-{attempt}-error"
    assert kept(tmp_path, attempt)[1] == f"evidence/attempt-{attempt}-error-2"
    (tmp_path / "evidence" / "notes.txt").touch()

    left = {path.name for path in (tmp_path / "evidence").iterdir()}
    newest = range(4, KEPT_ATTEMPTS + 4)
    assert left == {
        *(f"attempt-{attempt}-error" for attempt in newest),
        *(f"attempt-{attempt}-step-00000003-nan.json" for attempt in newest),
        *(f"attempt-{attempt}-error-2", "notes.txt"),
    }


@pytest.mark.timeout(120)
def test_a_log_that_is_gone_costs_the_stacks_only(tmp_path: Path) -> None:
    look = look_at_process(os.getpid(), str(tmp_path / "none.err"))
    assert look.state == "is alive and does not let Python run"
    assert "cannot be had" in look.stacks
