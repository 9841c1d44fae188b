"""Pictures of what an evaluation has found; drawn where they are asked for, by task."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ringworld_platform.evaluation_records import EVALUATIONS_FOLDER
from ringworld_platform.run_records import Record

log = logging.getLogger(__name__)

Draw = Callable[[Sequence[Record], Mapping[str, float], str, Path], None]
"""Draws answers and figures of a task, with a title, into a PNG file."""

PICTURES = {
    "perplexity": "ringworld_platform.perplexity_picture:draw_losses",
    "needle": "ringworld_platform.heat_map:draw_needles",
    "multi_needle": "ringworld_platform.heat_map:draw_many_needles",
    "video_needle": "ringworld_platform.heat_map:draw_video_needles",
}
"""``module:function`` (a ``Draw``) of each task that has a picture."""


def draw(
    run_folder: Path,
    name: str,
    task: str,
    answers: Sequence[Record],
    figures: Mapping[str, float],
    title: str,
) -> list[str]:
    """Draw the picture of a task, if it has one.

    Never raises: a picture is nice to have, and the run goes on without it.

    Args:
        run_folder: of the run.
        name: of the file, without ending.
        task: the task's name.
        answers: its records.
        figures: what they come to.
        title: of the picture.

    Returns:
        The paths of what was drawn, in the run folder.
    """
    if task not in PICTURES:
        return []
    module, _, function = PICTURES[task].partition(":")
    path = run_folder / EVALUATIONS_FOLDER / f"{name}.png"
    try:
        make: Draw = getattr(importlib.import_module(module), function)
        make(answers, figures, title, path)
    except Exception:
        log.exception("no picture of %s in %s", task, run_folder)
        return []
    return [path.relative_to(run_folder).as_posix()]
