"""The frames that a codebook learns from, and the clips that it never sees, on disk.

Raw frames lie in one file for each side, so that hours of video take no memory. They are decoded
once: a training that goes on after a kill finds them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ringworld_jobs.codebook import CodebookJob
from ringworld_workers.data.clips import Timeline
from ringworld_workers.data.files import DataError, InputFile, resolve
from ringworld_workers.data.media import sample_media
from ringworld_workers.data.sampling import SampledFrame, Sampling
from ringworld_workers.data.work import written_whole

_INDEX = "frames.json"
_REPORT_FRAMES = 50

Progress = Callable[[str, int], None]
"""Called with what is decoded, and how many of its frames so far."""


@dataclass(frozen=True, slots=True)
class HeldOutClip:
    """A stretch, video or image that no training step sees.

    Attributes:
        name: of the video or image, and its seconds.
        frames: how many there are, one after the other in the held-out file.
    """

    name: str
    frames: int


@dataclass(frozen=True, slots=True)
class Clips:
    """Both sides' frames.

    Attributes:
        folder: where they lie.
        size: pixels of a side.
        held_out: the held-out clips, in order.
        skipped: reason for each file that could not be used, by its name in the job.
    """

    folder: Path
    size: int
    held_out: tuple[HeldOutClip, ...]
    skipped: dict[str, str]

    def frames(self, split: str) -> npt.NDArray[np.uint8]:
        """uint8 [F, N, N, 3] of ``train`` or ``held_out``, memory-mapped."""
        path = self.folder / f"{split}.rgb"
        count = path.stat().st_size // (3 * self.size**2)
        shape = (count, self.size, self.size, 3)
        return np.memmap(path, dtype=np.uint8, mode="r", shape=shape)


@dataclass(frozen=True, slots=True)
class _Source:
    """A file, and which of it is held out: all, or stretches of the video of that name."""

    file: InputFile
    name: str
    video: str | None
    whole: bool


def gather_clips(
    job: CodebookJob, base: Path, folder: Path, on_progress: Progress | None = None
) -> Clips:
    """Decode a job's clips into a folder, or find them there.

    Args:
        job: the job.
        base: folder that its paths start from.
        folder: where the frames go.
        on_progress: told what is decoded.

    Raises:
        DataError: a path matches nothing, or a side is left without a frame.
    """
    sources = _sources(job, base)
    key = _key(job, sources)
    index = folder / _INDEX
    if index.is_file():
        stored = json.loads(index.read_text(encoding="utf-8"))
        if stored["key"] == key:
            held_out = tuple(HeldOutClip(**clip) for clip in stored["held_out"])
            return Clips(folder, job.shape.frame_size, held_out, stored["skipped"])
        index.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    held_out, skipped = _decode(job, sources, folder, on_progress or _ignore)
    clips = Clips(folder, job.shape.frame_size, held_out, skipped)
    for split in ("train", "held_out"):
        if not (folder / f"{split}.rgb").stat().st_size:
            reasons = "".join(f"; {name}: {why}" for name, why in skipped.items())
            raise DataError(f"no {split.replace('_', '-')} frame is left{reasons}")
    entry = {"key": key, "held_out": [asdict(clip) for clip in held_out], "skipped": skipped}
    with written_whole(index) as path:
        path.write_text(json.dumps(entry, indent=1), encoding="utf-8")
    return clips


def _ignore(name: str, frames: int) -> None:
    pass


def _sources(job: CodebookJob, base: Path) -> list[_Source]:
    sources = []
    for name, video in job.videos.items():
        files = resolve(video.path, base)
        if len(files) > 1:
            raise DataError(f"videos.{name}.path: {video.path!r} matches {len(files)} files")
        sources.append(_Source(files[0], name, name, name in job.held_out))
    images = {file.label: file for pattern in job.images for file in resolve(pattern, base)}
    patterns = [pattern for pattern in job.held_out if pattern not in job.videos]
    for label, file in sorted(images.items()):
        whole = any(fnmatch.fnmatchcase(file.path.name, pattern) for pattern in patterns)
        sources.append(_Source(file, label, None, whole))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(file.path.name, pattern) for file in images.values()):
            raise DataError(
                f"held_out: {pattern!r} is no video and matches no image's file name; correct it"
            )
    return sources


def _key(job: CodebookJob, sources: list[_Source]) -> str:
    """Changes with everything that the frames depend on; files by size and time of change."""
    used = job.model_dump(mode="json", include={"videos", "images", "held_out", "fps"})
    files = []
    for source in sources:
        status = source.file.path.stat()
        files.append((source.file.label, status.st_size, status.st_mtime_ns))
    text = json.dumps([used, job.shape.frame_size, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _decode(
    job: CodebookJob, sources: list[_Source], folder: Path, on_progress: Progress
) -> tuple[tuple[HeldOutClip, ...], dict[str, str]]:
    held_out: list[HeldOutClip] = []
    skipped: dict[str, str] = {}
    train, kept = folder / "train.rgb", folder / "held_out.rgb"
    with train.open("wb") as train_file, kept.open("wb") as kept_file:
        for source in sources:
            # A file that breaks off in its middle leaves nothing: both sides go back to here.
            ends = train_file.tell(), kept_file.tell()
            try:
                held_out += _write(job, source, train_file, kept_file, on_progress)
            except DataError as error:
                skipped[source.name] = str(error).removeprefix(f"{source.file.path}: ")
                for file, end in zip((train_file, kept_file), ends, strict=True):
                    file.seek(end)
                    file.truncate()
    return tuple(held_out), skipped


def _write(
    job: CodebookJob,
    source: _Source,
    train: IO[bytes],
    kept: IO[bytes],
    on_progress: Progress,
) -> list[HeldOutClip]:
    """Write one file's frames to their sides; says which clips were held out."""
    spans = job.videos[source.video].held_out if source.video and not source.whole else []
    clips = [f"{source.name} {span.start:g}-{span.end:g} s" for span in spans]
    counts = [0] * max(1, len(clips))
    frames = _media(job, source)
    if spans:
        place = train.tell()
        # Which side a frame belongs to depends on the frames around it, so all are written first.
        shown = []
        for frame in _reported(frames, source.name, on_progress):
            train.write(frame.pixels.tobytes())
            shown.append(frame.shown)
        membership = Timeline(np.asarray(shown), job.fps).held_out(spans)
        for clip in range(len(spans)):
            counts[clip] = int((membership == clip).sum())
        _separate(train, kept, place, membership, 3 * job.shape.frame_size**2)
    else:
        side = kept if source.whole else train
        for frame in _reported(frames, source.name, on_progress):
            side.write(frame.pixels.tobytes())
            counts[0] += 1
        clips = [source.name] if source.whole else []
    return [HeldOutClip(name, count) for name, count in zip(clips, counts, strict=False) if count]


def _media(job: CodebookJob, source: _Source) -> Iterator[SampledFrame]:
    crop = job.videos[source.video].crop if source.video else None
    sampling = Sampling(fps=job.fps, crop=crop)
    return sample_media(source.file.path, sampling, job.shape.frame_size)


def _reported(
    frames: Iterator[SampledFrame], name: str, on_progress: Progress
) -> Iterator[SampledFrame]:
    count = 0
    for frame in frames:
        yield frame
        count += 1
        if count % _REPORT_FRAMES == 1:
            on_progress(name, count)


def _separate(
    train: IO[bytes],
    kept: IO[bytes],
    place: int,
    membership: npt.NDArray[np.int64],
    frame_bytes: int,
) -> None:
    """Move the held-out frames of a video to their side, span by span; close the gaps."""
    train.flush()
    with Path(train.name).open("rb") as source:
        for span in range(int(membership.max(initial=-1)) + 1):
            for row in np.flatnonzero(membership == span):
                source.seek(place + int(row) * frame_bytes)
                kept.write(source.read(frame_bytes))
        end = place
        for row in np.flatnonzero(membership == -1):
            source.seek(place + int(row) * frame_bytes)
            frame = source.read(frame_bytes)
            train.seek(end)
            train.write(frame)
            end += frame_bytes
    train.seek(end)
    train.truncate()
