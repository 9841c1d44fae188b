"""The evaluations of a run as its report shows them: figures and pictures of each stage's tasks."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from ringworld_platform.evaluation_records import answers_file, figures_of, read_figures


@dataclass(frozen=True, slots=True)
class ShownTask:
    """One task of one stage.

    Attributes:
        stage: the stage whose model was asked.
        task: the task's name.
        items: how many items it had.
        figures: the main one first.
        pictures: as data URIs.
        answers: the log of answers, in the run folder.
    """

    stage: str
    task: str
    items: int
    figures: dict[str, float]
    pictures: tuple[str, ...]
    answers: str


def shown_tasks(run_folder: Path) -> list[ShownTask]:
    """The newest figures of every task, stage by stage; pictures that are gone are left out."""
    found = []
    for record in read_figures(run_folder):
        pictures = [run_folder / str(name) for name in record.get("files", ())]
        found.append(
            ShownTask(
                stage=str(record["stage"]),
                task=str(record["task"]),
                items=int(record["items"]),
                figures=figures_of(record),
                pictures=tuple(
                    _embed(path) for path in pictures if path.suffix == ".png" and path.is_file()
                ),
                answers=answers_file(int(record["stage_index"]), str(record["stage"])),
            )
        )
    return found


def _embed(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
