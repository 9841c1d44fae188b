"""The needle tests' pictures: a colour for each cell, whatever was asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ringworld_platform import heat_map

GREEN, RED, GREY = (26, 152, 80), (215, 48, 39), (227, 230, 234)


def _cells(path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(axis=2) < 6).sum())


def test_cells_are_green_red_or_not_asked(tmp_path: Path) -> None:
    answers: list[dict[str, Any]] = [
        {"length": length, "depth": depth, "score": float(length == 512)}
        for length in (512, 1024)
        for depth in (0, 50, 100)
    ]
    path = tmp_path / "needle.png"
    heat_map.draw_needles(answers[:-1], {"accuracy": 0.6}, "needle", path)
    green, red, grey = (_cells(path, colour) for colour in (GREEN, RED, GREY))
    # Three cells found, two not, one not asked.
    assert 1.3 < green / red < 1.7 and 1.6 < red / grey < 2.4


@pytest.mark.parametrize(
    ("draw", "facts"),
    [
        (heat_map.draw_many_needles, {"length": 512, "hidden": 4, "asked": 2}),
        (heat_map.draw_video_needles, {"frames": 30, "depth": 25.0, "ask": "colour"}),
        (heat_map.draw_needles, {"length": 1000, "depth": 50.0}),
    ],
)
def test_one_answer_is_a_picture(
    draw: Callable[..., None], facts: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "one.png"
    draw([{**facts, "score": 1.0}], {"accuracy": 1.0}, "one", path)
    assert _cells(path, GREEN) > 10_000 and _cells(path, GREY) < 1_000
