"""The data recipe: which files become which datasets, and through which tokenizers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringworld_jobs.spec import Name, Positive, Size, Spec


class TokenizerTraining(Spec):
    """A byte-level BPE trained on the recipe's own texts and captions."""

    vocabulary_size: Annotated[int, Field(ge=300)]
    """Pieces, special tokens and the 256 bytes included."""
    max_bytes: Size | None = None
    """Most bytes of text to train on, an equal share from the start of each training document;
    empty: all of it."""


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


class CodebookSpec(Spec):
    """A patch codebook: k-means over RGB patches, fitted on the recipe's training frames."""

    codebook_size: Size = 512
    """Codes."""
    frame_size: Size = 64
    """Frames are scaled and centre-cropped to this many pixels square."""
    patch_size: Size = 4
    """Pixels of one square patch; a frame has (frame_size / patch_size)^2 codes."""
    iterations: Size = 12
    """k-means iterations."""

    @property
    def codes_per_frame(self) -> int:
        """VQ codes of one frame."""
        return (self.frame_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _divides(self) -> CodebookSpec:
        if self.frame_size % self.patch_size:
            raise ValueError(
                f"frame_size {self.frame_size} is not divisible by patch_size {self.patch_size}; "
                f"the patches tile the frame, as 4 does 64"
            )
        return self


class SpanSpec(Spec):
    """A stretch of a video, in seconds from its start."""

    start: Annotated[float, Field(ge=0)]
    """First second."""
    end: Positive
    """Second at which it ends, exclusive."""

    @model_validator(mode="after")
    def _ordered(self) -> SpanSpec:
        if self.end <= self.start:
            raise ValueError(f"end {self.end:g} is not after start {self.start:g}")
        return self


class CaptionSpec(SpanSpec):
    """What is to be seen in a stretch of a video."""

    text: Annotated[str, Field(min_length=1)]
    """One sentence."""


class CropSpec(Spec):
    """A rectangle of the decoded frame, in pixels from its upper left corner."""

    left: Annotated[int, Field(ge=0)] = 0
    """Columns cut off at the left."""
    top: Annotated[int, Field(ge=0)] = 0
    """Rows cut off at the top."""
    width: Size
    """Columns kept."""
    height: Size
    """Rows kept."""


class VideoSpec(Spec):
    """A video file and its captions."""

    path: str
    """File path relative to the recipe, or package:NAME/path for a file of an installed Python
    package."""
    credit: str = ""
    """Author and licence, copied into the dataset."""
    crop: CropSpec | None = None
    """Part of the picture that is used, for instance without letterbox bars; empty: all of it."""
    captions: list[CaptionSpec] = []
    """Captions by stretch; a clip takes the caption that covers most of it."""
    held_out: list[SpanSpec] = []
    """Stretches kept for validation: no training clip and no codebook patch is taken from them."""


class TextDataset(Spec):
    """Plain-text files, one document each."""

    kind: Literal["text"]
    """text"""
    files: Annotated[list[str], Field(min_length=1)]
    """Glob patterns relative to the recipe, or package:NAME/pattern."""
    held_out: list[str] = []
    """Glob patterns (matched against file names) of documents kept for validation."""
    min_chars: Annotated[int, Field(ge=1)] = 1
    """Shorter documents are left out, and counted."""
    credit: str = ""
    """Author and licence, copied into the dataset."""


Layout = Literal["text,vision", "vision,text"]


class VideoTextDataset(Spec):
    """Clips of a fixed number of frames, each paired with its caption."""

    kind: Literal["video_text"]
    """video_text"""
    videos: Annotated[list[str], Field(min_length=1)]
    """Names from the recipe's `videos`."""
    fps: Positive = 4.0
    """Frames taken per second of video."""
    frames_per_clip: Size
    """Frames of one clip; each costs codes_per_frame + 1 tokens."""
    stride_frames: Size | None = None
    """Frames from one clip's start to the next one's; empty: frames_per_clip (no overlap)."""
    layouts: Annotated[list[Layout], Field(min_length=1)] = ["text,vision", "vision,text"]
    """Each clip gives one example per layout: text first trains generation, vision first
    understanding."""


Dataset = Annotated[TextDataset | VideoTextDataset, Field(discriminator="kind")]


class RecipeSpec(Spec):
    """One data recipe."""

    kind: Literal["data"]
    """What the file is: data."""
    name: Name
    """Name of the recipe."""
    seed: int = 0
    """Seed of the codebook's sampling."""
    tokenizer: TokenizerSpec
    """The text tokenizer."""
    codebook: CodebookSpec | None = None
    """The vision tokenizer; needed by video datasets."""
    videos: dict[str, VideoSpec] = {}
    """Video files by name."""
    datasets: Annotated[dict[Name, Dataset], Field(min_length=1)]
    """Datasets by name; a job's mixture refers to these names."""
