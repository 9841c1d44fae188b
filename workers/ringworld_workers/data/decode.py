"""Examples back to what people can read and see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringworld_model.batch import VISION
from ringworld_model.tokens import frames_of
from ringworld_model.vision.frame_tokenizer import FrameTokenizer, load_frame_tokenizer
from ringworld_workers.data.files import DataError
from ringworld_workers.data.shards import Dataset, read_meta
from ringworld_workers.data.tokenizer import TextTokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class TextRun:
    """Neighbouring text tokens that all carry loss, or none of them."""

    text: str
    loss: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class ClipRun:
    """A clip.

    Attributes:
        frames: frames that it has.
        loss: whether its tokens carry loss.
        tokens: of the clip, eof and eov included.
        pictures: uint8 [P, N, N, 3], some of its frames, evenly spaced; none where the codes'
            tokenizer is not here.
        note: why there is no picture, or what is wrong with the clip; empty else.
    """

    frames: int
    loss: bool
    tokens: int
    pictures: npt.NDArray[np.uint8]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One example, decoded.

    Attributes:
        row: its place in the dataset.
        name: what it is called.
        tokens: that it has.
        loss_tokens: those of them that the model learns to predict.
        runs: in order; of a long text the middle is left out.
    """

    row: int
    name: str
    tokens: int
    loss_tokens: int
    runs: tuple[TextRun | ClipRun, ...]


class Decoder:
    """Decodes the examples of a prepared folder's datasets."""

    def __init__(self, folder: Path, *, most_text: int = 400, most_pictures: int = 8) -> None:
        """Remember where the tokenizers lie; they are loaded when they are needed.

        Args:
            folder: of the prepared recipe.
            most_text: text tokens of a run that are decoded, from its start and its end.
            most_pictures: frames of a clip that are decoded.
        """
        self._folder, self._most_text, self._most_pictures = folder, most_text, most_pictures

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return load_tokenizer(self._folder)

    @cached_property
    def _frames(self) -> FrameTokenizer | None:
        try:
            return load_frame_tokenizer(self._folder)
        except ValueError:
            return None

    def sample(self, dataset: Dataset, index: int) -> Sample:
        """Decode one example.

        Raises:
            DataError: the folder holds no tokenizer, or the shard is damaged.
        """
        tokens, modality, loss = dataset.raw(index)
        counted = loss.copy()
        counted[:1] = 0  # nobody predicts the first token
        vision = modality == VISION
        edges = np.flatnonzero(np.diff(vision) | (~vision[1:] & (np.diff(counted) != 0))) + 1
        runs: list[TextRun | ClipRun] = []
        for start, stop in zip([0, *edges], [*edges, len(tokens)], strict=True):
            ids, carries = tokens[start:stop], bool(counted[start:stop].any())
            if vision[start]:
                runs.append(self._clip(ids, carries, dataset.meta["codebook"]))
            else:
                runs.append(TextRun(self._text(ids), carries, len(ids)))
        return Sample(
            row=dataset.row(index),
            name=dataset.name(index),
            tokens=len(tokens),
            loss_tokens=int(counted.sum()),
            runs=tuple(runs),
        )

    def _text(self, ids: npt.NDArray[np.int32]) -> str:
        if len(ids) <= self._most_text:
            return self._decode(ids)
        last = self._most_text // 4
        first = self._most_text - last
        left_out = len(ids) - self._most_text
        return (
            f"{self._decode(ids[:first])} [... {left_out:,} tokens ...] {self._decode(ids[-last:])}"
        )

    def _decode(self, ids: npt.NDArray[np.int32]) -> str:
        """Text, with the document tokens, which tokenizers leave out, spelled."""
        tokenizer = self._tokenizer
        spelled = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
        text, pending = "", list[int]()
        for token in ids.tolist():
            if token in spelled:
                text += tokenizer.decode(pending) + spelled[token]
                pending = []
            else:
                pending.append(token)
        return text + tokenizer.decode(pending)

    def _clip(
        self, ids: npt.NDArray[np.int32], loss: bool, codebook: dict[str, Any] | None
    ) -> ClipRun:
        none = np.zeros((0, 1, 1, 3), np.uint8)
        if codebook is None:
            return ClipRun(0, loss, len(ids), none, "the dataset names no codebook")
        try:
            codes = frames_of(ids, codebook["codes_per_frame"], codebook["size"])
        except ValueError as error:
            return ClipRun(0, loss, len(ids), none, str(error))
        tokenizer = self._frames
        if tokenizer is None or tokenizer.digest() != codebook["digest"]:
            note = "its frame tokenizer does not lie beside the dataset"
            return ClipRun(len(codes), loss, len(ids), none, note)
        chosen = np.linspace(0, len(codes) - 1, min(len(codes), self._most_pictures)).astype(int)
        return ClipRun(len(codes), loss, len(ids), tokenizer.decode(codes[chosen]))


def find_datasets(place: Path) -> tuple[Path, dict[str, Path]]:
    """The prepared folder and the datasets that a path stands for.

    Args:
        place: a prepared recipe's folder, or that of one of its datasets.

    Raises:
        DataError: it is neither.
    """
    meta = read_meta(place)
    if "datasets" in meta:
        return place, {name: place / name for name in meta["datasets"]}
    if "splits" not in meta:
        raise DataError(f"{place} is neither a prepared recipe nor one of its datasets")
    return place.absolute().parent, {str(meta.get("name", place.name)): place}
