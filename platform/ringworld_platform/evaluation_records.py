"""What a run folder keeps of evaluations: a log of answers a stage, and the tasks' figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ringworld_platform.run_records import Record, read_lines

EVALUATIONS_FOLDER = "evaluations"
ANSWER, EVALUATION = "answer", "evaluation"
"""Kinds of lines: a model's answer to one item; the figures of a task that is done."""
_NAME = re.compile(r"\d{2,}-.+\.jsonl")
# What a line of the metric log has beside a task's figures.
_ABOUT = frozenset(
    {
        *("kind", "stage", "stage_index", "step", "global_step", "attempt", "time"),
        *("task", "items", "model"),
    }
)


def answers_file(stage_index: int, stage: str) -> str:
    """Path in the run folder of the log of answers of one stage's model."""
    return f"{EVALUATIONS_FOLDER}/{stage_index:02d}-{stage}.jsonl"


def is_answers_file(name: str) -> bool:
    """Whether a path in a run folder is that of a log of answers."""
    folder, _, file = name.rpartition("/")
    return folder == EVALUATIONS_FOLDER and _NAME.fullmatch(file) is not None


def answers_files(folder: Path) -> list[str]:
    """The logs of answers that a run folder has, stage by stage."""
    found = sorted((folder / EVALUATIONS_FOLDER).glob("*.jsonl"))
    names = [path.relative_to(folder).as_posix() for path in found]
    return [name for name in names if is_answers_file(name)]


def read_answers(folder: Path, stage_index: int, stage: str) -> list[Record]:
    """The answers that a stage's model has given, each item once."""
    lines = read_lines(folder / answers_file(stage_index, stage)).records
    first: dict[tuple[str, str], Record] = {}
    for line in lines:
        if line.get("kind") == ANSWER:
            first.setdefault((str(line.get("task")), str(line.get("id"))), line)
    return list(first.values())


def read_figures(folder: Path) -> list[Record]:
    """The newest figures of each task of each stage, in order."""
    newest: dict[tuple[int, str], Record] = {}
    for name in answers_files(folder):
        for line in read_lines(folder / name).records:
            if line.get("kind") == EVALUATION:
                newest[(int(line.get("stage_index", 0)), str(line.get("task")))] = line
    return [newest[key] for key in sorted(newest, key=lambda key: key[0])]


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an ``evaluation`` record, the main one first."""
    return {
        key: float(value)
        for key, value in record.items()
        if key not in _ABOUT and isinstance(value, int | float) and not isinstance(value, bool)
    }


def told(record: Record) -> str:
    """``perplexity of stage 4k: loss 2.314 (24 items)``."""
    name, value = next(iter(figures_of(record).items()), ("no figures", None))
    figure = name if value is None else f"{name} {value:.4g}"
    return f"{record['task']} of {record['stage']}: {figure} ({record['items']} items)"


def evaluation_lines(events: Iterable[Record]) -> list[str]:
    """The newest main figure of each task of each stage in words, from a run's events."""
    newest: dict[tuple[Any, Any], str] = {}
    for event in events:
        if event.get("kind") == EVALUATION:
            newest[(event.get("stage"), event.get("task"))] = str(event.get("text"))
    return list(newest.values())
