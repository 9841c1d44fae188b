"""From a dataset's kind to its reader, the one place where the kinds are told apart.

Readers are imported as they are needed: a recipe of text loads no video library.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ringworld_jobs.recipe import (
    ChatDataset,
    Dataset,
    LwmDataset,
    MediaTextDataset,
    NeedlesDataset,
    RecipeSpec,
    TextDataset,
    VideoTextDataset,
)
from ringworld_workers.data.draft import DatasetReader, WorkItem
from ringworld_workers.data.files import DataError

if TYPE_CHECKING:
    from ringworld_workers.data.media_store import CodeGeometry, MediaStore, MediaUse


@dataclass(frozen=True, slots=True)
class Means:
    """What readers are made with, as far as the build has got.

    Attributes:
        base: folder of the recipe.
        answers: folder of generated questions and answers, shared by all builds of a cache.
        tokenizer_file: file of the tokenizer.
        media: codes of images and videos; None without a codebook.
        geometry: of the recipe's codebook; None without one.
    """

    base: Path
    answers: Path
    tokenizer_file: Path
    media: MediaStore | None = None
    geometry: CodeGeometry | None = None


def make_readers(recipe: RecipeSpec, means: Means) -> dict[str, DatasetReader]:
    """A reader for each dataset; none reads anything yet.

    Raises:
        DataError: a dataset needs a codebook, and the recipe has none.
    """
    return {name: _reader(name, data, recipe, means) for name, data in recipe.datasets.items()}


def _reader(name: str, dataset: Dataset, recipe: RecipeSpec, means: Means) -> DatasetReader:
    if isinstance(dataset, TextDataset):
        from ringworld_workers.data.text_reader import TextReader

        return TextReader(name, dataset, means.base, recipe.seed)
    if isinstance(dataset, VideoTextDataset):
        from ringworld_workers.data.clip_reader import ClipReader

        return ClipReader(
            name, dataset, recipe.videos, means.base, _needed(name, means.media), recipe.seed
        )
    if isinstance(dataset, MediaTextDataset):
        from ringworld_workers.data.media_reader import MediaReader

        media = _needed(name, means.media)
        return MediaReader(name, dataset, means.base, media, seed=recipe.seed)
    if isinstance(dataset, LwmDataset):
        from ringworld_workers.data.lwm_reader import LwmReader

        return LwmReader(name, dataset, means.base, means.geometry, recipe.seed)
    if isinstance(dataset, ChatDataset):
        from ringworld_workers.data.chat_reader import ChatReader

        return ChatReader(name, dataset, means.base, means.media, recipe.seed)
    if isinstance(dataset, NeedlesDataset):
        from ringworld_workers.data.needle_reader import NeedleReader

        return NeedleReader(name, dataset, means.base, means.tokenizer_file)
    from ringworld_workers.data.long_qa_reader import LongQaReader

    return LongQaReader(name, dataset, means.base, means.answers, means.tokenizer_file, recipe.seed)


def _needed(name: str, media: MediaStore | None) -> MediaStore:
    if media is None:
        raise DataError(f"datasets.{name}: needs a codebook; add `codebook:` to the recipe")
    return media


@runtime_checkable
class ChecksFirst(Protocol):
    """A reader that can tell some mistakes before anything is read."""

    def check(self) -> None:
        """Tell them; see ``check_readers``."""


def check_readers(readers: Iterable[DatasetReader]) -> None:
    """Ask each what it can tell before anything is read, but with a tokenizer.

    Raises:
        DataError: what is to be made cannot be.
    """
    for reader in readers:
        if isinstance(reader, ChecksFirst):
            reader.check()


def media_of(reader: DatasetReader, item: WorkItem) -> Iterator[MediaUse]:
    """The media that an item uses; nothing for kinds that use none."""
    media = getattr(reader, "media", None)
    if callable(media):
        yield from media(item)


def credits_of(recipe: RecipeSpec, dataset: Dataset) -> list[str]:
    """Credits of a dataset and of its videos, each once."""
    lines = [dataset.credit]
    if isinstance(dataset, VideoTextDataset):
        lines += [recipe.videos[name].credit for name in dataset.videos]
    return list(dict.fromkeys(line for line in lines if line))
