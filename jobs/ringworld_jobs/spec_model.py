"""The shape of the model: a preset, with any field replaced, and where its weights come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringworld_jobs.spec_base import Positive, Size, Spec
from ringworld_model.config import PRESETS, ModelConfig, RopeForm, RopeScaling, preset


class VisionSpec(Spec):
    """The visual vocabulary."""

    codebook_size: Annotated[int, Field(ge=0)] | None = None
    """VQ codes of the vision table; empty takes those of init_from, where it has any, else the data
    recipe's, else the preset's; 0 builds a text-only model."""


class RopeScalingSpec(Spec):
    """Llama 3's stretch of the rotary embedding. It works on the frequencies that a stage's
    rope_theta gives, whatever theta that is; a curriculum that raises theta mostly wants none."""

    factor: Annotated[float, Field(ge=1)]
    """What the frequencies of slow pairs are divided by."""
    low_freq_factor: Positive
    """Pairs that turn fewer times than this within the original length are slow."""
    high_freq_factor: Positive
    """Pairs that turn more often than this are left as they are; above low_freq_factor."""
    original_max_position_embeddings: Size
    """The original length, in tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> RopeScalingSpec:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} is not below high_freq_factor "
                f"{self.high_freq_factor:g}; Llama 3 has 1 and 4"
            )
        return self


class ModelSpec(Spec):
    """The shape of the model: a preset, with any field replaced, or that of given weights."""

    preset: Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)})] = "tiny"
    """A named shape: tiny, LWM's 7b, llama2-7b, llama3-8b and others. Left out beside
    `init_from: hf:...`, the folder's config.json gives the shape; beside `run:...`, that run."""
    init_from: str | None = None
    """Weights that the first stage starts from: hf:FOLDER is a Llama-family checkpoint in Hugging
    Face's layout, lwm:FILE a parameter file of the Large World Model's JAX release (with its
    preset), relative to this file. run:RUN[/STAGE[/STEP]] is a committed checkpoint of another run
    in this job's checkpoint.store, named by its id or by its job, whose newest run is meant then;
    run:STORE/RUN[/STAGE[/STEP]] one in another store, by its URL. Without a step it is the stage's
    newest, without a stage the last stage's. Empty draws the weights from `seed`, as it does vision
    tables that the checkpoint lacks."""
    hidden_size: Size | None = None
    """Width of the residual stream."""
    ffn_size: Size | None = None
    """Inner width of the SwiGLU MLP."""
    num_layers: Size | None = None
    """Decoder layers."""
    num_heads: Size | None = None
    """Query heads."""
    num_kv_heads: Size | None = None
    """Key and value heads (grouped-query attention when fewer than num_heads)."""
    head_dim: Size | None = None
    """Width of one head; empty means hidden_size / num_heads."""
    text_vocab_size: Size | None = None
    """Rows of the text table; empty takes those of init_from, else the data recipe's tokenizer
    size, else the preset's."""
    norm_eps: Positive | None = None
    """Epsilon of every RMSNorm."""
    rope_form: RopeForm | None = None
    """Which pairs RoPE rotates: half (Hugging Face) or interleaved (Meta, LWM)."""
    rope_scaling: RopeScalingSpec | Literal["none"] | None = None
    """Llama 3's stretch of RoPE, in every stage, on top of the stage's rope_theta; none turns the
    preset's (llama3.2-1b has one) or the checkpoint's off."""
    tie_text_embeddings: bool | None = None
    """Share the text table with the text head."""
    tie_vision_embeddings: bool | None = None
    """Share the vision table with the vision head."""
    init_std: Positive | None = None
    """Standard deviation of the initial weights."""
    vision: VisionSpec = VisionSpec()
    """The visual vocabulary."""

    def config(
        self, *, text_vocab_size: int | None = None, codebook_size: int | None = None
    ) -> ModelConfig:
        """The model's shape; the arguments fill in what the spec leaves to the data.

        Args:
            text_vocab_size: the tokenizer's size, used where the spec names none.
            codebook_size: the codebook's size, used where the spec names none.

        Raises:
            KeyError: unknown preset.
            ValueError: an impossible shape.
        """
        apart = {"preset", "vision", "init_from", "rope_scaling"}
        overrides = self.model_dump(exclude=apart, exclude_none=True)
        overrides.setdefault("text_vocab_size", text_vocab_size)
        codes = (
            self.vision.codebook_size if self.vision.codebook_size is not None else codebook_size
        )
        config = preset(self.preset, **overrides, vision_codebook_size=codes)
        if self.rope_scaling is None:
            return config
        scaling = None
        if self.rope_scaling != "none":
            scaling = RopeScaling(**self.rope_scaling.model_dump())
        return replace(config, rope_scaling=scaling)
