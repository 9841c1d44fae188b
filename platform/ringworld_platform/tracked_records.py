"""What a record of the metric log is on MLflow's side: points, tags and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringworld_jobs.any_job import Job
from ringworld_platform.run_records import Record

# A record's identity is its run, step and time, not a series.
_IDENTITY = frozenset({"kind", "stage", "stage_index", "step", "global_step", "time", "attempt"})
_BORDERS = ("stage_start", "stage_end")


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one series.

    Attributes:
        name: of the series.
        value: may be NaN or infinite.
        time: seconds since the epoch, from the record: what is sent twice is the same point.
        step: the job's step, so that stages line up on one axis.
    """

    name: str
    value: float
    time: float
    step: int


def time_of(record: Record) -> float:
    """When it was recorded, seconds since the epoch; 0 where it does not say."""
    value = record.get("time", 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def points_of(record: Record) -> list[Point]:
    """The numbers of a record, those in its mappings too, as ``kind/name``; a step's as ``name``.

    A record that names its ``task`` has it in between, since a stage may have several.
    """
    kind = str(record.get("kind"))
    if kind in _BORDERS:
        return []
    parts = [] if kind == "step" else [kind]
    if isinstance(task := record.get("task"), str):
        parts.append(task)
    prefix = "".join(f"{part}/" for part in parts)
    when, step = time_of(record), _step_of(record)
    return [Point(f"{prefix}{name}", value, when, step) for name, value in _numbers(record)]


def border_points(record: Record, spec: Job) -> list[Point]:
    """A stage's beginning or end as points: beside a curve, their steps show where it changed."""
    index = int(record["stage_index"])
    if record.get("kind") not in _BORDERS or index >= len(spec.stages):
        return []
    stage = spec.stages[index]
    facts = {
        "stage/index": float(index),
        "stage/context_length": float(stage.context_length),
        "stage/rope_theta": float(stage.rope_theta),
    }
    when, step = time_of(record), _step_of(record)
    return [Point(name, value, when, step) for name, value in facts.items()]


def files_of(record: Record, run_folder: Path) -> list[tuple[Path, str]]:
    """The files that a record names, each with the folder that it has among the artifacts.

    Those outside the run's folder are left out, and those that are not there.
    """
    names = record.get("files")
    if isinstance(names, Mapping):
        names = list(names.values())
    root = run_folder.resolve()
    found = []
    for name in names if isinstance(names, list) else []:
        path = (root / str(name)).resolve()
        if path.is_relative_to(root) and path.is_file():
            parent = path.parent.relative_to(root).as_posix()
            found.append((path, "" if parent == "." else parent))
    return found


def _step_of(record: Record) -> int:
    step = record.get("global_step", record.get("step"))
    return int(step) if isinstance(step, int | float) else 0


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if key in _IDENTITY or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield str(key), float(value)
        elif isinstance(value, Mapping):
            yield from ((f"{key}/{name}", number) for name, number in _numbers(value))
