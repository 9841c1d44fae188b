"""Sampling by timestamps, crops, and files that cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from ringworld_jobs.recipe import CropSpec
from ringworld_workers.data.files import DataError
from ringworld_workers.data.sampling import Sampling
from ringworld_workers.data.video import sample_video

VideoWriter = Callable[..., Path]


def levels(path: Path, fps: float) -> tuple[list[float], list[float], list[int]]:
    frames = list(sample_video(path, Sampling(fps), 8))
    assert all(frame.pixels.shape == (8, 8, 3) for frame in frames)
    assert all(frame.pixels.dtype == np.uint8 for frame in frames)
    pictures = [round(float(frame.pixels.mean())) for frame in frames]
    return [f.time for f in frames], [f.shown for f in frames], pictures


def test_sampling_takes_what_is_on_screen(tmp_path: Path, write_video: VideoWriter) -> None:
    path = write_video(tmp_path / "film.mkv", [(k, k, k) for k in range(0, 200, 10)])
    times, shown, pictures = levels(path, 4.0)
    assert times == pytest.approx([0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75])
    # 0.25 s lies between the frames of 0.2 s and 0.3 s: the earlier is on screen.
    assert shown == pytest.approx([0, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7])
    assert pictures == [0, 20, 50, 70, 100, 120, 150, 170]


def test_sampling_above_the_files_rate_repeats_frames(
    tmp_path: Path, write_video: VideoWriter
) -> None:
    path = write_video(tmp_path / "film.mkv", [(10, 10, 10), (20, 20, 20), (30, 30, 30)])
    assert levels(path, 20.0)[2] == [10, 10, 20, 20, 30]


def test_a_variable_rate_is_sampled_by_time_not_by_count(
    tmp_path: Path, write_video: VideoWriter
) -> None:
    colours = [(k, k, k) for k in (10, 20, 30, 40, 50)]
    path = write_video(tmp_path / "film.mkv", colours, times=[0.0, 0.1, 0.2, 1.0, 1.1])
    _, shown, pictures = levels(path, 5.0)
    assert pictures == [10, 30, 30, 30, 30, 40]
    assert shown == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 1.0])


def test_the_crop_cuts_bars_off(tmp_path: Path, write_video: VideoWriter) -> None:
    path = write_video(tmp_path / "film.mkv", [(90, 90, 90)])
    crop = CropSpec(left=4, top=2, width=40, height=28)
    (frame,) = sample_video(path, Sampling(1, crop=crop), 4)
    assert frame.pixels.tolist() == np.full((4, 4, 3), 90).tolist()
    with pytest.raises(DataError, match="48x32"):
        list(sample_video(path, Sampling(1, crop=CropSpec(left=20, width=40, height=28)), 4))


def test_frames_come_one_by_one(tmp_path: Path, write_video: VideoWriter) -> None:
    path = write_video(tmp_path / "film.mkv", [(k, k, k) for k in range(100)])
    frames = sample_video(path, Sampling(10), 4)
    assert round(float(next(frames).pixels.mean())) == 0
    frames.close()


def test_what_cannot_be_decoded_is_an_error_with_its_place(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.mp4"
    garbage.write_bytes(b"\x00\x01not a film" * 100)
    with pytest.raises(DataError, match="cannot be decoded at its start"):
        list(sample_video(garbage, Sampling(1), 4))
    film = write_film(tmp_path / "film.mp4")
    data = bytearray(film.read_bytes())
    for position in range(len(data) // 2, len(data) * 3 // 4, 7):
        data[position] ^= 0xFF
    film.write_bytes(data)
    frames = sample_video(film, Sampling(10), 4)
    # Its first frames are sound.
    next(frames)
    with pytest.raises(DataError, match=r"(the frame at|cannot be decoded after) \d\.\d"):
        list(frames)


def write_film(path: Path) -> Path:
    """3 s of noise: every byte of the file matters."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = 48, 32
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
