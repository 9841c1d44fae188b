"""What a run folder says: its spec, its metric log, its events and its last known state.

Readers come while a writer is busy and after crashes, so a torn line is skipped and never fatal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
STATE_FILE = "state.json"
CHECKPOINTS_FOLDER = "checkpoints"
SPEC_FILE = "spec.yaml"
REPORT_FILE = "report.html"
PLOTS_FOLDER = "plots"


@dataclass(frozen=True, slots=True)
class Lines:
    """Complete lines of a log, and where the next read starts.

    Attributes:
        records: the decoded objects, in file order.
        offset: byte after the last complete line.
        broken: complete lines that hold no JSON object (a writer died within one).
    """

    records: list[Record]
    offset: int
    broken: int


def read_lines(path: Path, offset: int = 0, limit_bytes: int | None = None) -> Lines:
    """Read the complete lines of a JSON-lines file from a byte offset.

    Args:
        path: the file; a missing one reads as empty.
        offset: byte to start at, the ``offset`` of an earlier read.
        limit_bytes: most bytes to read, so that a long backlog needs bounded memory; a line that
            is longer than this is read whole.

    Returns:
        The records; an incomplete last line waits for a later read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read() if limit_bytes is None else file.read(limit_bytes)
            if limit_bytes is not None and len(data) == limit_bytes and b"\n" not in data:
                data += file.readline()
    except FileNotFoundError:
        return Lines([], offset, 0)
    complete = data[: data.rfind(b"\n") + 1]
    records: list[Record] = []
    broken = 0
    for line in complete.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            broken += 1
    return Lines(records, offset + len(complete), broken)


def read_state(folder: Path) -> Record:
    """The run's last saved state; empty when there is none or it is unreadable."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def read_spec(folder: Path) -> Record:
    """The resolved spec as plain data; empty when there is none or it is unreadable."""
    try:
        spec = yaml.safe_load((folder / SPEC_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return spec if isinstance(spec, dict) else {}


def effective_steps(records: list[Record]) -> list[Record]:
    """Step records as training went, in order: of a step that was redone, the last one counts.

    After a failure a job goes back to its last checkpoint, so that the log holds some steps twice.
    """
    newest: dict[tuple[int, int], Record] = {}
    for record in records:
        if record.get("kind") == "step":
            newest[(int(record.get("stage_index", 0)), int(record.get("step", 0)))] = record
    return [newest[key] for key in sorted(newest)]


@dataclass(frozen=True, slots=True)
class RunRecords:
    """Everything that one run folder holds, read once.

    Attributes:
        folder: the run folder; its name is the run id.
        spec: the resolved job spec as plain data.
        state: the last saved state.
        records: every metric record, redone steps included.
        events: every event.
    """

    folder: Path
    spec: Record
    state: Record
    records: list[Record]
    events: list[Record]

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return str(self.state.get("run_id") or self.folder.name)

    @property
    def stages(self) -> list[Record]:
        """The spec's stages, in order."""
        stages = self.spec.get("stages")
        return [stage for stage in stages if isinstance(stage, dict)] if stages else []

    def of_kind(self, kind: str) -> list[Record]:
        """The metric records of one kind, in file order."""
        return [record for record in self.records if record.get("kind") == kind]

    def steps(self) -> list[Record]:
        """See ``effective_steps``."""
        return effective_steps(self.records)


def read_run(folder: Path) -> RunRecords:
    """Read a run folder whole.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run folder: it does not exist")
    return RunRecords(
        folder=folder,
        spec=read_spec(folder),
        state=read_state(folder),
        records=read_lines(folder / METRICS_FILE).records,
        events=read_lines(folder / EVENTS_FILE).records,
    )
