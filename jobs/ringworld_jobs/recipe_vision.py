"""The vision tokenizer, and datasets of images and video."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringworld_jobs.recipe_dataset import DatasetBase
from ringworld_jobs.spec import Positive, Size, Spec


class CodebookSpec(Spec):
    """The vision tokenizer: a patch codebook fitted on the recipe's training frames (k-means over
    RGB patches), or an existing tokenizer from a path."""

    path: str | None = None
    """An existing one: what `ringworld data train-codebook` wrote, a folder with a VQModel's
    config.json and weights (aMUSEd's, which LWM uses), or another dataset's codebook.npz. The
    fields below are then the file's, and may not be given."""
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
        """VQ codes of one frame; 0 where only the file at `path` knows."""
        return 0 if self.path else (self.frame_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _possible(self) -> CodebookSpec:
        if self.path is not None:
            given = sorted(self.model_fields_set - {"path"})
            if given:
                raise ValueError(
                    f"{', '.join(given)} cannot be given with path: the tokenizer there has its "
                    f"own; take {'it' if len(given) == 1 else 'them'} out"
                )
        elif self.frame_size % self.patch_size:
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


Layout = Literal["text,vision", "vision,text"]
Layouts = Annotated[list[Layout], Field(min_length=1)]


class VideoTextDataset(DatasetBase):
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
    layouts: Layouts = ["text,vision", "vision,text"]
    """Each clip gives one example per layout: text first trains generation, vision first
    understanding."""


class MediaTextDataset(DatasetBase):
    """Images and videos with the captions of a table, one example a row and layout."""

    kind: Literal["media_text"]
    """media_text"""
    captions: Annotated[list[str], Field(min_length=1)]
    """Glob patterns of .jsonl or .csv tables, a row an image or video with its caption, relative to
    the recipe, or package:NAME/pattern."""
    media_root: str = ""
    """Folder that the tables' paths are relative to, or package:NAME/folder; empty: each table's
    own."""
    path_field: str = "path"
    """Key or column of the file."""
    text_field: str = "caption"
    """Key or column of the caption."""
    fps: Positive = 4.0
    """Frames taken per second of video. A row may name the stretch to take in `start` and `end`, in
    seconds."""
    max_frames: Size = 30
    """Frames of a video at most, subsampled evenly; an image is one frame."""
    layouts: Layouts = ["text,vision", "vision,text"]
    """text,vision trains generation, vision,text understanding."""
    choose: Literal["all", "one"] = "all"
    """all writes an example per layout; one draws a layout for each row by its digest."""
    template: Literal["plain", "chat"] = "plain"
    """plain is caption and media; chat wraps them as a request and its answer, with loss on the
    answer alone: text,vision asks to generate, vision,text to describe."""
