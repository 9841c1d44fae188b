"""The data recipe: which files become which datasets, and through which tokenizers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringworld_jobs.recipe_dataset import DatasetBase
from ringworld_jobs.recipe_needles import NeedlesDataset
from ringworld_jobs.recipe_text import (
    ChatDataset,
    GeneratorSpec,
    LongQaDataset,
    LwmCodesSpec,
    LwmDataset,
    TextDataset,
)
from ringworld_jobs.recipe_vision import (
    CaptionSpec,
    CodebookSpec,
    CropSpec,
    MediaTextDataset,
    SpanSpec,
    VideoSpec,
    VideoTextDataset,
)
from ringworld_jobs.spec import DocumentsSpec, Name, Size, Spec

__all__ = [
    "CaptionSpec",
    "ChatDataset",
    "CodebookSpec",
    "CropSpec",
    "Dataset",
    "DatasetBase",
    "DocumentsSpec",
    "GeneratorSpec",
    "LongQaDataset",
    "LwmCodesSpec",
    "LwmDataset",
    "MediaTextDataset",
    "NeedlesDataset",
    "RecipeSpec",
    "SpanSpec",
    "TextDataset",
    "TokenizerSpec",
    "TokenizerTraining",
    "VideoSpec",
    "VideoTextDataset",
]


class TokenizerTraining(Spec):
    """A byte-level BPE trained on the recipe's own texts and captions."""

    vocabulary_size: Annotated[int, Field(ge=300)]
    """Pieces, special tokens and the 256 bytes included."""
    max_bytes: Size | None = None
    """Most bytes of documents to train on, and as many of captions: an equal share from the start
    of each, or of fewer, evenly chosen, where that were less than 1 KiB; empty: all of them."""
    split_digits: bool = False
    """Make each digit a piece of its own, as Llama's tokenizer does: numbers are copied digit by
    digit then, however they are cut elsewhere."""


class TokenizerSpec(Spec):
    """The text tokenizer: trained here, or taken from a path."""

    train: TokenizerTraining | None = None
    """Train one on the recipe's texts."""
    path: str | None = None
    """An existing one: a Hugging Face tokenizer folder or tokenizer.json, or a SentencePiece .model
    file."""

    @model_validator(mode="after")
    def _one(self) -> TokenizerSpec:
        if (self.train is None) == (self.path is None):
            raise ValueError("give train or path, one of them")
        return self


Dataset = Annotated[
    TextDataset
    | VideoTextDataset
    | MediaTextDataset
    | LwmDataset
    | ChatDataset
    | LongQaDataset
    | NeedlesDataset,
    Field(discriminator="kind"),
]


class RecipeSpec(Spec):
    """One data recipe."""

    kind: Literal["data"]
    """What the file is: data."""
    name: Name
    """Name of the recipe."""
    seed: int = 0
    """Seed of the codebook's sampling and of what is held out by share."""
    bad_files: Literal["skip", "refuse"] = "skip"
    """What happens to files and records that cannot be used: skip leaves them out, counts them and
    lists each with its reason; refuse stops the build at the first."""
    tokenizer: TokenizerSpec
    """The text tokenizer."""
    codebook: CodebookSpec | None = None
    """The vision tokenizer; needed by datasets of images and video."""
    videos: dict[str, VideoSpec] = {}
    """Video files by name."""
    datasets: Annotated[dict[Name, Dataset], Field(min_length=1)]
    """Datasets by name; a job's mixture refers to these names."""
