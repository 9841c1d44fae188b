"""A codebook job: what is wrong in it is said with its line, its limit and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ringworld_jobs.load import JobSpecError, load_codebook, load_job, load_recipe

GOOD: dict[str, Any] = {
    "kind": "codebook",
    "name": "mine",
    "videos": {"walk": {"path": "walk.mp4", "held_out": [{"start": 1, "end": 2}]}},
}


def problems(data: dict[str, Any], tmp_path: Path, check_files: bool = False) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(JobSpecError) as caught:
        load_codebook(path, check_files=check_files)
    return "\n".join(map(str, caught.value.problems))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": {"chanels": 8}}, "shape.chanels = 8: unknown key; did you mean channels?"),
        ({"shape": {"frame_size": 66}}, "frame_size 66 is not divisible by 4"),
        ({"shape": {"channels": 6}}, "6 channels is not divisible by norm_groups 4"),
        ({"shape": {"multipliers": [1]}}, "shape.multipliers"),
        ({"training": {"crop_size": 30}}, "training.crop_size 30 is not a multiple of 4"),
        ({"training": {"crop_size": 68}}, "up to shape.frame_size 64"),
        ({"training": {"time_limit": 10}}, "expected a duration with its unit"),
        ({"training": {"continuous_share": 1}}, "training.continuous_share = 1"),
        ({"device": "gpu"}, "auto, cpu or cuda"),
        ({"videos": {}}, "nothing to learn from"),
        ({"videos": {"walk": {"path": "walk.mp4"}}}, "nothing is held out"),
        ({"held_out": ["wlak"]}, "no such entry under `videos`; there are walk"),
        ({"held_out": ["walk"]}, "every video is held out"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in problems(GOOD | change, tmp_path)


def test_files_are_looked_for(tmp_path: Path) -> None:
    said = problems(GOOD | {"images": ["photos/*.jpg"]}, tmp_path, check_files=True)
    assert "no such file" in said
    assert "no file matches" in said


def test_other_kinds_of_file_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    for load in (load_job, load_recipe):
        with pytest.raises(JobSpecError, match="this is a codebook job"):
            load(path)
    assert "a data recipe (kind: data), and a codebook job" in problems({"kind": "data"}, tmp_path)


def test_crops_are_half_a_frame_in_whole_codes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"shape": {"frame_size": 60}}))
    job = load_codebook(path, check_files=False)
    assert (job.crop_size, job.shape.codes_per_frame) == (32, 225)
