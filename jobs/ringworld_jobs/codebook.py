"""The codebook job: which clips a small VQGAN learns from, its shape, and how long it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringworld_jobs.recipe_vision import VideoSpec
from ringworld_jobs.spec import Name, Positive, Share, Size, Spec
from ringworld_jobs.units import Every, Interval, Seconds


class CodebookShape(Spec):
    """The network. A frame has (frame_size / 2^(levels - 1))^2 codes; the levels are those of
    `multipliers`."""

    frame_size: Size = 64
    """Frames are scaled and centre-cropped to this many pixels square."""
    channels: Size = 16
    """Channels of the first level."""
    multipliers: Annotated[list[Size], Field(min_length=2)] = [1, 2, 2]
    """Channels of each level as multiples of `channels`; every level after the first halves the
    frame. aMUSEd has [1, 2, 2, 4, 6] over 128 channels and 256 pixels."""
    layers_per_block: Size = 1
    """Residual blocks of a level in the encoder; the decoder has one more."""
    norm_groups: Size = 4
    """Groups of the group norms; divides every level's channels. Few groups learn faster in narrow
    networks."""
    latent_channels: Size = 8
    """Width of a code's vector."""
    codebook_size: Annotated[int, Field(ge=2)] = 512
    """Codes."""

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels of a side that one code stands for."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def codes_per_frame(self) -> int:
        """Codes of one frame."""
        return (self.frame_size // self.downsampling) ** 2

    @model_validator(mode="after")
    def _possible(self) -> CodebookShape:
        if self.frame_size % self.downsampling:
            raise ValueError(
                f"frame_size {self.frame_size} is not divisible by {self.downsampling}, by which "
                f"{len(self.multipliers)} multipliers shrink a frame; take a multiple of it"
            )
        for width in self.block_out_channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"a level of {width} channels is not divisible by norm_groups "
                    f"{self.norm_groups}; lower norm_groups, or change channels"
                )
        return self


class CodebookTraining(Spec):
    """How the network is trained."""

    steps: Size = 1500
    """Steps."""
    batch_crops: Size = 16
    """Crops of one step, drawn at random from all training frames, half of them mirrored."""
    crop_size: Size | None = None
    """Pixels of a side of a crop; empty: half the frame's, rounded up to whole codes. Many small
    crops teach more in the same time than a few whole frames."""
    learning_rate: Positive = 2e-3
    """Rate of AdamW after 20 steps of warm-up; it falls along a cosine to a fiftieth."""
    continuous_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the steps at the start in which latents are not quantised; k-means over what the
    encoder has learned by then is where the codebook starts."""
    commitment: Share = 0.25
    """Weight of the pull of latents to their codes."""
    gradient: Share = 0.1
    """Weight of the difference of neighbouring pixels' differences: edges stay sharper."""
    evaluate_every_steps: Size = 100
    """Steps between two evaluations on the held-out frames."""
    save_every: Every = Interval(seconds=30)
    """How often the state is saved that a killed training goes on from."""
    time_limit: Seconds | None = None
    """Training ends at this time at the latest, its learning rate having fallen by then."""


class CodebookJob(Spec):
    """A codebook job."""

    kind: Literal["codebook"]
    """What the file is: codebook."""
    name: Name
    """Name of the codebook."""
    seed: int = 0
    """Seed of weights, batches and k-means."""
    videos: dict[str, VideoSpec] = {}
    """Video files by name, as in a data recipe; captions are not used."""
    images: list[str] = []
    """Glob patterns of images, relative to this file, or package:NAME/pattern."""
    held_out: list[str] = []
    """What is kept for validation whole: names of videos, and glob patterns of images' file names.
    Stretches of a video are kept by its own `held_out`."""
    fps: Positive = 4.0
    """Frames taken per second of video."""
    shape: CodebookShape = CodebookShape()
    """The network."""
    training: CodebookTraining = CodebookTraining()
    """How it is trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it is trained; auto takes a GPU where there is one."""

    @property
    def crop_size(self) -> int:
        """Pixels of a side of the crops that it trains on."""
        if self.training.crop_size is not None:
            return self.training.crop_size
        step = self.shape.downsampling
        return -(-self.shape.frame_size // (2 * step)) * step

    @model_validator(mode="after")
    def _crops(self) -> CodebookJob:
        crop, shape = self.training.crop_size, self.shape
        if crop is not None and (crop % shape.downsampling or crop > shape.frame_size):
            raise ValueError(
                f"training.crop_size {crop} is not a multiple of {shape.downsampling} (pixels of a "
                f"code) up to shape.frame_size {shape.frame_size}"
            )
        return self
