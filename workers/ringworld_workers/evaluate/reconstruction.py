"""Images and videos through the codebook and back: what no model that draws codes can better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringworld_jobs.evaluate_questions import ReconstructionTask
from ringworld_workers.data.files import DataError, InputFile, resolve
from ringworld_workers.data.media import sample_media
from ringworld_workers.data.sampling import SampledFrame, Sampling
from ringworld_workers.evaluate.needle import mean
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject

_BATCH = 16
"""Frames that are in memory at one time."""
_PEAK = 255.0


class Reconstruction:
    """Each file once, its frames at the codebook's size."""

    name = "reconstruction"

    def __init__(self, settings: ReconstructionTask, subject: Subject) -> None:
        """Find the files; none is read yet.

        Raises:
            DataError: a pattern matches none.
            RequestError: the model has no vision, or its codebook is not at hand.
        """
        self._settings = settings
        self._codebook = subject.loaded.need_codebook("evaluate.reconstruction")
        self._files: dict[str, InputFile] = {}
        for pattern in settings.files:
            try:
                for file in resolve(pattern, Path()):
                    label = file.label if file.label.startswith("package:") else file.path.name
                    # Files of one name in two folders.
                    label = label if label not in self._files else str(file.path)
                    self._files.setdefault(label, file)
            except DataError as error:
                raise DataError(f"evaluate.reconstruction.files: {error}") from error

    def items(self) -> Sequence[Item]:
        """One for each file."""
        return [Item(label) for label in sorted(self._files)]

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """See ``Task.run``; ``score`` is the PSNR over all pixels of the file's frames, in dB."""
        for item in items:
            ring.progress(item.id)
            error, frames, used = 0.0, 0, set[int]()
            for pixels in self._frames(item.id):
                codes = self._codebook.encode(pixels)
                drawn = self._codebook.decode(codes)
                error += float(np.square(drawn.astype(np.float64) - pixels).mean()) * len(pixels)
                frames += len(pixels)
                used.update(np.unique(codes).tolist())
            decibels = psnr(error / frames)
            yield {
                "id": item.id,
                "frames": frames,
                "codes_used": len(used),
                "score": decibels,
                "kind": "image" if frames == 1 else "video",
            }

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """``psnr``, the mean over files in dB; ``psnr_of_image``, ``psnr_of_video``; the worst."""
        figures = {"psnr": mean([record["score"] for record in records])}
        for kind in sorted({record["kind"] for record in records}):
            scores = [record["score"] for record in records if record["kind"] == kind]
            figures[f"psnr_of_{kind}"] = mean(scores)
        figures["psnr_of_worst_file"] = min(record["score"] for record in records)
        return figures

    def _frames(self, label: str) -> Iterator[npt.NDArray[np.uint8]]:
        """Frames in batches, uint8 [n, N, N, 3]."""
        settings = self._settings
        sampling = Sampling(settings.fps, settings.frames)
        sampled: Iterator[SampledFrame] = sample_media(
            self._files[label].path, sampling, self._codebook.frame_size
        )
        try:
            while batch := [frame.pixels for frame in itertools.islice(sampled, _BATCH)]:
                yield np.stack(batch)
        except DataError as error:
            raise DataError(f"evaluate.reconstruction: {label}: {error}") from error


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pixels; of equal ones, that of half a level."""
    return 10 * math.log10(_PEAK**2 / max(mean_squared_error, 0.25))
