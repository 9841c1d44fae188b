"""Codes of images and videos, decoded and encoded once and kept by content.

A file's name in the store is made of what its content depends on: the media file's digest, the
sampling, the frame's size and the tokenizer's digest. Each is written beside its place and moved
into it, so several tasks, and a build that is started again, share what is there.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ringworld_jobs.recipe import SpanSpec
from ringworld_model.vision.frame_tokenizer import FrameTokenizer, load_frame_tokenizer
from ringworld_workers.data.clips import touching
from ringworld_workers.data.draft import WorkItem
from ringworld_workers.data.files import DataError, InputFile, file_digest
from ringworld_workers.data.frame_spool import FrameSpool
from ringworld_workers.data.media import sample_media
from ringworld_workers.data.sampling import SampledFrame, Sampling
from ringworld_workers.data.work import written_whole

__all__ = [
    "MAX_FITTED_FRAMES",
    "CodeGeometry",
    "EncodedMedia",
    "MediaStore",
    "MediaUse",
    "MediaUser",
    "Sampling",
    "media_digest",
]

MAX_FITTED_FRAMES = 1024
"""Frames that a codebook's patches are sampled from, evenly spaced over all training frames."""
_BATCH_FRAMES = 256
_BATCH_BYTES = 1 << 25
"""Frames that are encoded at one time: at most so many, and of so many bytes."""
_FORMAT = 1
"""Part of every name; counts up when sampling, scaling or the files' layout change."""


@dataclass(frozen=True, slots=True)
class CodeGeometry:
    """What a dataset must know of its codes.

    Attributes:
        codebook_size: codes; eof and eov follow them.
        codes_per_frame: codes of one frame.
    """

    codebook_size: int
    codes_per_frame: int


@dataclass(frozen=True, slots=True)
class EncodedMedia:
    """An image or video as the datasets take it.

    Attributes:
        codes: [F, C] int32.
        times: [F] float64, the moments of the frames in seconds from the file's first picture.
        shown: [F] float64, when the picture appeared that was on screen then.
    """

    codes: npt.NDArray[np.int32]
    times: npt.NDArray[np.float64]
    shown: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MediaUse:
    """A medium that a dataset uses: for encoding it ahead, and for fitting a codebook.

    Attributes:
        file: the image or video.
        sampling: which of its frames.
        document: the document that its examples come from.
        held_out: as a draft's: True, False, or None where the recipe's share decides.
        spans: stretches kept for validation, in seconds of the file.
    """

    file: InputFile
    sampling: Sampling
    document: str
    held_out: bool | None = None
    spans: tuple[SpanSpec, ...] = ()


class MediaUser(Protocol):
    """A dataset's reader that uses media."""

    def media(self, item: WorkItem) -> Iterator[MediaUse]:
        """The media of an item, in order; what cannot be used is left for ``drafts`` to refuse."""


class MediaStore:
    """Codes of media in a folder. Picklable; loads its tokenizer on first use, once a process.

    Before there is a tokenizer, frames can be sampled for fitting one (``spool``, ``fit_frames``);
    they are then encoded from there, and removed.
    """

    def __init__(
        self,
        folder: Path,
        frame_size: int,
        tokenizer_path: Path | None = None,
        digest: str = "",
        device: str | None = None,
    ) -> None:
        """Name the parts; nothing is read.

        Args:
            folder: of the codes, and of frames that wait for their codebook; made where needed.
            frame_size: pixels of a side of a frame.
            tokenizer_path: what ``load_frame_tokenizer`` loads; None: frames can only be sampled.
            digest: the tokenizer's: codes of another are never taken for its own.
            device: where frames are encoded; None: the GPU where there is one, else the CPU.
        """
        self.folder, self.frame_size = folder, frame_size
        self.tokenizer_path, self.digest, self.device = tokenizer_path, digest, device

    @property
    def geometry(self) -> CodeGeometry:
        """Of the tokenizer, which is loaded.

        Raises:
            DataError: there is none.
        """
        tokenizer = self._tokenizer()
        return CodeGeometry(tokenizer.codebook_size, tokenizer.codes_per_frame)

    def codes(self, file: InputFile, sampling: Sampling) -> EncodedMedia:
        """Codes of an image or video, from the store or newly made.

        Args:
            file: the medium, told by its content, not by its suffix.
            sampling: which frames.

        Raises:
            DataError: the file cannot be used; says why, and names no path.
        """
        name = self._name(file, sampling)
        place = self._place(f"{name}-{self.digest[:16]}.npz")
        with suppress(FileNotFoundError):
            return _load(place)
        spool = FrameSpool(self._place(name), self.frame_size)
        frames = spool.frames() or sample_media(file.path, sampling, self.frame_size)
        media = _encoded(frames, self._tokenizer(), self.frame_size)
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as path, path.open("wb") as stream:
            np.savez(stream, codes=media.codes, times=media.times, shown=media.shown)
        spool.remove()
        return media

    def spool(self, file: InputFile, sampling: Sampling) -> None:
        """Sample a medium's frames onto disk, where that is not done, for ``fit_frames``.

        Args:
            file: the medium.
            sampling: which frames.

        Raises:
            DataError: the file cannot be used; says why, and names no path.
        """
        spool = FrameSpool(self._place(self._name(file, sampling)), self.frame_size)
        if spool.times() is None:
            spool.write(sample_media(file.path, sampling, self.frame_size))

    def fit_frames(
        self, uses: Iterable[MediaUse], limit: int = MAX_FITTED_FRAMES
    ) -> npt.NDArray[np.uint8]:
        """Frames to fit a codebook on, evenly spaced over all that training may see.

        A frame that any use holds out is left out, whatever file name or rate it comes under. Media
        that cannot be used are passed over: whoever asks for their codes hears why. What is not on
        disk yet (``spool``, by as many tasks as one likes) is sampled now.

        Args:
            uses: all media of a recipe, in its order; their ``held_out`` decided, None: training.
            limit: frames at most, all of which are in memory.

        Returns:
            uint8 [n, frame_size, frame_size, 3], n <= limit; the same for the same uses.
        """
        found = list(uses)
        digests = {use.file: digest for use in found if (digest := _digest_or_none(use.file))}
        apart = {digests[use.file] for use in found if use.held_out and use.file in digests}
        spans: dict[str, list[SpanSpec]] = {}
        for use in found:
            spans.setdefault(digests.get(use.file, ""), []).extend(use.spans)
        training: list[tuple[FrameSpool, npt.NDArray[np.int64]]] = []
        wanted = dict.fromkeys((use.file, use.sampling) for use in found if use.file in digests)
        seen = set()
        for file, sampling in wanted:
            digest = digests[file]
            if digest in apart or (digest, sampling) in seen:
                continue
            seen.add((digest, sampling))
            try:
                self.spool(file, sampling)
            except DataError:
                continue
            spool = FrameSpool(self._place(self._name(file, sampling)), self.frame_size)
            times = spool.times()
            if times is not None:
                held_out = touching(times[:, 0], times[:, 1], sampling.fps, spans[digest])
                training.append((spool, np.flatnonzero(~held_out)))
        return _evenly(training, limit, self.frame_size)

    def _tokenizer(self) -> FrameTokenizer:
        if self.tokenizer_path is None:
            raise DataError("images and videos need a codebook; add `codebook:` to the recipe")
        return _load_tokenizer(self.tokenizer_path, self.device)

    def _name(self, file: InputFile, sampling: Sampling) -> str:
        key = [_FORMAT, media_digest(file), _plain(sampling), self.frame_size]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

    def _place(self, name: str) -> Path:
        # Folders of their own, for a file system is slow with a million names in one.
        return self.folder / name[:2] / name


def _plain(sampling: Sampling) -> list[float | int | None | dict[str, int]]:
    crop = sampling.crop
    return [
        sampling.fps,
        sampling.max_frames,
        sampling.start,
        sampling.end,
        None if crop is None else crop.model_dump(),
    ]


def _encoded(frames: Iterable[SampledFrame], tokenizer: FrameTokenizer, size: int) -> EncodedMedia:
    """Encode frames as they come, a batch of them in memory at a time."""
    most = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // (3 * size**2)))
    stream = iter(frames)
    codes, times = [], []
    while batch := list(itertools.islice(stream, most)):
        codes.append(tokenizer.encode(np.stack([frame.pixels for frame in batch])))
        times += [(frame.time, frame.shown) for frame in batch]
    moments = np.array(times)
    joined = np.concatenate(codes).astype(np.int32, copy=False)
    return EncodedMedia(joined, moments[:, 0].copy(), moments[:, 1].copy())


def _evenly(
    spools: Sequence[tuple[FrameSpool, npt.NDArray[np.int64]]], limit: int, size: int
) -> npt.NDArray[np.uint8]:
    total = sum(len(rows) for _, rows in spools)
    number = min(limit, total)
    chosen = np.arange(number) * total // max(1, number)
    result = np.zeros((number, size, size, 3), np.uint8)
    first = 0
    for spool, rows in spools:
        mine = np.flatnonzero((chosen >= first) & (chosen < first + len(rows)))
        if len(mine):
            result[mine] = spool.pixels(rows[chosen[mine] - first].tolist())
        first += len(rows)
    return result


def _load(place: Path) -> EncodedMedia:
    with np.load(place, allow_pickle=False) as arrays:
        return EncodedMedia(arrays["codes"], arrays["times"], arrays["shown"])


def _digest_or_none(file: InputFile) -> str | None:
    with suppress(DataError):
        return media_digest(file)
    return None


def media_digest(file: InputFile) -> str:
    """SHA-256 of a file's content, remembered by this process while size and time stay the same.

    Raises:
        DataError: the file cannot be read; names no path.
    """
    try:
        entry = file.path.stat()
        if not stat.S_ISREG(entry.st_mode):
            raise DataError("is no file")
        return _digest_of(file.path, entry.st_size, entry.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError("there is no such file") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=4096)
def _digest_of(path: Path, size: int, modified: int) -> str:
    """A file is read once, though many rows may name stretches of it."""
    return file_digest(path)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: Path, device: str | None) -> FrameTokenizer:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load_frame_tokenizer(path, device)
    except ValueError as error:
        raise DataError(f"codebook: {error}") from error
