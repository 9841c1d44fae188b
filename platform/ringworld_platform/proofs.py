"""parity.json of a run folder: what was found for each stage, before it trained or by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ringworld_platform.run_records import Record

PARITY_FILE = "parity.json"

By = Literal["preflight", "command"]
"""Who looked: the stage's own workers before its first step, or `ringworld parity`."""


def read_proofs(folder: Path) -> dict[str, dict[str, Record]]:
    """Reports by stage, then by who looked; empty when there are none or they are unreadable."""
    try:
        found = json.loads((folder / PARITY_FILE).read_text(encoding="utf-8"))
        stages = found["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return stages if isinstance(stages, dict) else {}


def keep_proof(folder: Path, by: By, report: Record) -> Path:
    """Put a report beside those of the other stages, in place of an earlier one of its kind.

    Args:
        folder: the run folder.
        by: who looked.
        report: ``ParityReport.to_json()``.

    Returns:
        The file: ``{"passed": whether all are, "stages": {stage: {by: report}}}``.

    Raises:
        OSError: it cannot be written.
    """
    stages = read_proofs(folder)
    stages.setdefault(str(report["stage"]), {})[by] = report
    passed = all(each["passed"] for found in stages.values() for each in found.values())
    path = folder / PARITY_FILE
    scratch = path.with_suffix(".json.tmp")
    text = json.dumps({"passed": passed, "stages": stages}, indent=1)
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(path)
    return path


def is_proved(folder: Path, stage: str, mesh: Mapping[str, Any]) -> bool:
    """Whether a stage's own workers have proved its ring on this mesh.

    Args:
        folder: the run folder.
        stage: the stage's name.
        mesh: sizes of the axes and the device, as the preflight reports them.
    """
    report = read_proofs(folder).get(stage, {}).get("preflight", {})
    return report.get("passed") is True and report.get("mesh") == dict(mesh)
