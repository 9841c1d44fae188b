"""What is held out never reaches the training frames, and what is broken is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imsave

from ringworld_jobs.codebook import CodebookJob
from ringworld_workers.codebook.clips import HeldOutClip, gather_clips
from ringworld_workers.data.files import DataError


def test_a_stretch_goes_to_one_side_whole(job: dict[str, Any], tmp_path: Path) -> None:
    clips = gather_clips(CodebookJob(**job), tmp_path, tmp_path / "frames")
    train, held_out = clips.frames("train"), clips.frames("held_out")
    # Frames 40..59 are red; 60 - 20 of the first video and 30 of the second are left.
    assert (len(train), len(held_out)) == (40 + 30, 20)
    assert (np.ptp(train.astype(int), axis=3).max(), held_out[..., 1:].max()) == (0, 0)
    assert clips.held_out == (HeldOutClip("one 4-6 s", 20),)


def test_whole_videos_and_images_are_held_out_by_name(job: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        imsave(tmp_path / name, np.full((20, 30, 3), 7 if name == "a.png" else 200, np.uint8))
    job["videos"]["one"]["held_out"] = []
    job |= {"held_out": ["one", "b*"], "images": ["*.png"]}
    clips = gather_clips(CodebookJob(**job), tmp_path, tmp_path / "frames")
    assert [(clip.name, clip.frames) for clip in clips.held_out] == [("one", 60), ("b.png", 1)]
    assert clips.frames("train")[-1].max() == 7
    assert clips.frames("held_out")[-1].min() == 200
    job["held_out"] = ["one", "c*"]
    with pytest.raises(DataError, match=r"held_out: 'c\*' is no video and matches no image"):
        gather_clips(CodebookJob(**job), tmp_path, tmp_path / "other")


def test_a_broken_file_is_left_out_and_named(job: dict[str, Any], tmp_path: Path) -> None:
    whole = (tmp_path / "two.mkv").read_bytes()
    (tmp_path / "two.mkv").write_bytes(b"no film" * 100)
    clips = gather_clips(CodebookJob(**job), tmp_path, tmp_path / "frames")
    assert list(clips.skipped) == ["two"]
    assert len(clips.frames("train")) == 40
    (tmp_path / "two.mkv").write_bytes(whole)
    (tmp_path / "one.mkv").write_bytes(b"no film" * 100)
    with pytest.raises(DataError, match="no held-out frame is left; one: "):
        gather_clips(CodebookJob(**job), tmp_path, tmp_path / "frames")


def test_frames_are_decoded_once_and_again_after_a_change(
    job: dict[str, Any], tmp_path: Path
) -> None:
    seen: list[str] = []

    def gather() -> int:
        clips = gather_clips(
            CodebookJob(**job), tmp_path, tmp_path / "frames", lambda name, _: seen.append(name)
        )
        return len(clips.frames("held_out"))

    assert gather() == 20
    assert set(seen) == {"one", "two"}
    seen.clear()
    assert gather() == 20
    assert not seen
    os.utime(tmp_path / "two.mkv", ns=(1, 1))
    job["videos"]["one"]["held_out"] = [{"start": 5, "end": 6}]
    assert gather() == 10
    assert seen
