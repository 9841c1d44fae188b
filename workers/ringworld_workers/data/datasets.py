"""Token shards of one dataset, from text documents or from the codes of clips."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringworld_jobs.recipe import TextDataset, VideoSpec, VideoTextDataset
from ringworld_model.batch import TEXT, VISION
from ringworld_model.packing import Example
from ringworld_model.tokens import VISION_END, VISION_START, Layout, Span, join_spans, vision_tokens
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.clips import Timeline, cut_clips
from ringworld_workers.data.files import DataError, InputFile
from ringworld_workers.data.inputs import read_text
from ringworld_workers.data.shards import FORMAT_VERSION, SPLITS, ShardWriter, Split
from ringworld_workers.data.statistics import TargetCounts
from ringworld_workers.data.tokenizer import TextTokenizer

_BATCH_DOCUMENTS = 16
NUM_END_IDS = 2
"""eof and eov, the vision ids after the codes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The two tokenizers that a dataset is written with.

    Attributes:
        tokenizer: of text.
        codebook: of frames; None in a recipe without video.
    """

    tokenizer: TextTokenizer
    codebook: PatchCodebook | None

    def meta(self) -> dict[str, Any]:
        """Their sizes and digests, for meta.json."""
        codebook = self.codebook
        return {
            "tokenizer": {"size": self.tokenizer.size, "digest": self.tokenizer.digest()},
            "codebook": None
            if codebook is None
            else {
                "size": codebook.codebook_size,
                "codes_per_frame": codebook.codes_per_frame,
                "frame_size": codebook.frame_size,
                "patch_size": codebook.patch_size,
                "digest": codebook.digest(),
            },
        }

    @property
    def num_vision_ids(self) -> int:
        """Codes plus eof and eov; 0 without a codebook."""
        return 0 if self.codebook is None else self.codebook.codebook_size + NUM_END_IDS


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """A video as the datasets take it: codes [F, C] int32, and when the frames are on screen."""

    spec: VideoSpec
    codes: npt.NDArray[np.int32]
    timeline: Timeline


class DatasetWriter:
    """Writes both splits of a dataset and counts as it goes; use it as a context manager."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        """Create the folder and open both splits."""
        folder.mkdir()
        self._folder, self._vocabulary = folder, vocabulary
        size = vocabulary.tokenizer.size
        self._counts = {split: TargetCounts(size, vocabulary.num_vision_ids) for split in SPLITS}
        self._stack = ExitStack()
        self._shards = {
            split: self._stack.enter_context(ShardWriter(folder, split)) for split in SPLITS
        }

    def __enter__(self) -> DatasetWriter:
        """Return the writer."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Close both splits."""
        self._stack.__exit__(*error)

    def add(self, split: Split, example: Example, name: str) -> None:
        """Append an example; every token but the first carries loss."""
        loss = np.ones(len(example.tokens), dtype=np.uint8)
        self._shards[split].add(example.tokens, example.modality, loss, name)
        self._counts[split].add(example.tokens, example.modality, loss)

    def write_meta(self, meta: Mapping[str, Any]) -> None:
        """Write meta.json: what the caller knows, and what was counted.

        Raises:
            DataError: not one training example was written.
        """
        train, held_out = self._counts["train"], self._counts["held_out"]
        if train.examples == 0:
            reasons = "; ".join(f"{s['path']}: {s['reason']}" for s in meta["skipped"])
            left_out = ", ".join(f"{n} {why}" for why, n in meta["left_out"].items() if n)
            raise DataError(
                f"datasets.{meta['name']}: no training example is left "
                f"(skipped: {reasons or 'none'}; left out: {left_out or 'none'}); "
                f"correct the files, or relax min_chars, frames_per_clip or held_out"
            )
        content = {
            "format": FORMAT_VERSION,
            **meta,
            **self._vocabulary.meta(),
            "splits": {
                split: {**counts.summary(), "shards": self._shards[split].entries()}
                for split, counts in self._counts.items()
            },
            "held_out_entropy_nats": held_out.entropy(),
            "train_unigram_counts": {
                name: counts.tolist() for name, counts in train.counts.items()
            },
        }
        (self._folder / "meta.json").write_text(json.dumps(content), encoding="utf-8")


def write_documents(
    writer: DatasetWriter,
    files: Sequence[InputFile],
    held_out: set[str],
    tokenizer: TextTokenizer,
    on_documents: Callable[[int], None],
) -> None:
    """Write text documents, one an example: <bos>, the text, <eos>.

    Args:
        writer: of the dataset.
        files: the documents, readable all.
        held_out: labels of those that are kept for validation.
        tokenizer: of the text.
        on_documents: called with the number written so far.
    """
    for start in range(0, len(files), _BATCH_DOCUMENTS):
        group = files[start : start + _BATCH_DOCUMENTS]
        encoded = tokenizer.encode_batch([read_text(file) for file in group])
        for file, ids in zip(group, encoded, strict=True):
            spans = [
                Span([tokenizer.bos_id], TEXT),
                Span(ids, TEXT),
                Span([tokenizer.eos_id], TEXT),
            ]
            split: Split = "held_out" if file.label in held_out else "train"
            writer.add(split, join_spans(spans), file.label)
        on_documents(start + len(group))


def write_clips(
    writer: DatasetWriter,
    dataset: VideoTextDataset,
    videos: Mapping[str, EncodedVideo],
    vocabulary: Vocabulary,
) -> int:
    """Write every clip of a dataset's videos once per layout.

    Args:
        writer: of the dataset.
        dataset: clip length, stride and layouts.
        videos: the dataset's videos that could be decoded.
        vocabulary: with a codebook.

    Returns:
        Clips left out because no caption covers them.
    """
    without_caption = 0
    for name in dataset.videos:
        if name not in videos:
            continue
        video = videos[name]
        clips = cut_clips(
            video.timeline,
            length=dataset.frames_per_clip,
            stride=dataset.stride_frames or dataset.frames_per_clip,
            held_out=video.spec.held_out,
            captions=video.spec.captions,
        )
        for clip in clips:
            if clip.caption is None:
                without_caption += 1
                continue
            codes = video.codes[clip.start : clip.start + clip.length]
            start = clip.start / video.timeline.fps
            for layout in dataset.layouts:
                example = clip_tokens(clip.caption, codes, layout, vocabulary)
                title = f"{name} from {start:.3f} s, {clip.length} frames, {layout}"
                writer.add("held_out" if clip.held_out else "train", example, title)
    return without_caption


def clip_tokens(
    caption: str, codes: npt.NDArray[np.int32], layout: Layout, vocabulary: Vocabulary
) -> Example:
    """A captioned clip as LWM lays it out, between <bos> and <eos>.

    Args:
        caption: what is to be seen.
        codes: [F, C] int32.
        layout: ``text,vision`` or ``vision,text``.
        vocabulary: with a codebook.

    Raises:
        DataError: the vocabulary has no codebook.
    """
    if vocabulary.codebook is None:
        raise DataError("clips need a codebook; add `codebook:` to the recipe")
    tokenizer = vocabulary.tokenizer
    text = [Span(tokenizer.encode(caption), TEXT)]
    clip = [
        Span(tokenizer.encode(VISION_START), TEXT),
        Span(vision_tokens(codes, vocabulary.codebook.codebook_size), VISION),
        Span(tokenizer.encode(VISION_END), TEXT),
    ]
    middle = text + clip if layout == "text,vision" else clip + text
    bos, eos = Span([tokenizer.bos_id], TEXT), Span([tokenizer.eos_id], TEXT)
    return join_spans([bos, *middle, eos])


def dataset_credits(
    dataset: TextDataset | VideoTextDataset, videos: Mapping[str, VideoSpec]
) -> list[str]:
    """Credits of a dataset or of its videos, each once."""
    if isinstance(dataset, TextDataset):
        lines = [dataset.credit]
    else:
        lines = [videos[name].credit for name in dataset.videos]
    return list(dict.fromkeys(line for line in lines if line))
