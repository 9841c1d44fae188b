"""Evidence is kept where it can be, and never in the way of a restart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ringworld_platform.evidence import Evidence, RankFacts, save
from ringworld_platform.first_cause import raised
from ringworld_platform.run_state import JobRecord
from ringworld_workers.actor import WorkerFailure
from ringworld_workers.stacks import look_at_process

# A file's name in bytes that are no UTF-8, as Python holds it.
NAME = os.fsdecode(b"caf\xe9.py")


def kept(run_folder: Path) -> tuple[JobRecord, str | None]:
    error = WorkerFailure(("RuntimeError",), f"cannot read {NAME}", f"in {NAME}", 1.0)
    failure = raised(0, error).failure
    record = JobRecord(
        job="mini", run_id="mini-1", num_stages=1, attempt=2, run_folder="", spec_digest="d",
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


@pytest.mark.timeout(30)
def test_a_log_that_is_gone_costs_the_stacks_only(tmp_path: Path) -> None:
    look = look_at_process(os.getpid(), str(tmp_path / "none.err"))
    assert look.state == "is alive and does not let Python run"
    assert "cannot be had" in look.stacks
