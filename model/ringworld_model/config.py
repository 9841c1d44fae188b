"""Shapes of a model, and the named presets. Imports no torch, so that a laptop can plan a job."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

SPARE_VISION_IDS = 256
"""LWM keeps 256 ids after the codebook (eof, eov and unused rows): 8,192 + 256 = 8,448."""

RopeForm = Literal["half", "interleaved"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3's stretch of RoPE: slow pairs turn slower, fast ones stay, those between are mixed.

    It works on the frequencies that the stage's rope_theta gives, whatever theta that is. So a
    curriculum that raises theta on a scaled model stretches twice; most want no scaling then.

    Attributes:
        factor: what the slow pairs' frequencies are divided by.
        low_freq_factor: pairs that turn fewer times than this within the original length are slow.
        high_freq_factor: pairs that turn more often than this are fast.
        original_max_position_embeddings: the original length, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        """Refuse numbers that order no pairs.

        Raises:
            ValueError: names the field, its value and the rule it breaks.
        """
        if self.factor < 1:
            raise ValueError(f"model.rope_scaling.factor={self.factor:g} is below 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor:g} is not between 0 and "
                f"high_freq_factor={self.high_freq_factor:g}"
            )
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                "model.rope_scaling.original_max_position_embeddings="
                f"{self.original_max_position_embeddings} is below 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one decoder with a text and a vision table and head.

    Attributes:
        hidden_size: width of the residual stream.
        ffn_size: inner width of the SwiGLU MLP.
        num_layers: decoder layers.
        num_heads: query heads; ``hidden_size = num_heads * head_dim`` unless head_dim says else.
        num_kv_heads: key/value heads; divides num_heads (GQA).
        head_dim: width of a head; 0 means ``hidden_size // num_heads``.
        text_vocab_size: rows of the text table.
        vision_codebook_size: VQ codes; 0 builds no vision table and no vision head.
        norm_eps: epsilon of every RMSNorm.
        rope_form: "half" rotates (i, i + head_dim/2), Hugging Face's layout; "interleaved"
            rotates (2i, 2i + 1), Meta's and LWM's.
        rope_scaling: Llama 3's stretch of the rotary frequencies; None leaves them as they are.
        tie_text_embeddings: the text head shares the text table.
        tie_vision_embeddings: the vision head shares the vision table.
        init_std: standard deviation of the initial weights.
    """

    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    text_vocab_size: int = 32_000
    vision_codebook_size: int = 8_192
    norm_eps: float = 1e-6
    rope_form: RopeForm = "half"
    rope_scaling: RopeScaling | None = None
    tie_text_embeddings: bool = False
    tie_vision_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        """Derive head_dim and refuse shapes that no attention kernel can take.

        Raises:
            ValueError: names the field, its value and the rule it breaks.
        """
        if self.head_dim == 0:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"model.hidden_size={self.hidden_size} is not divisible by "
                    f"model.num_heads={self.num_heads}; set model.head_dim or change one of them"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not divisible by "
                f"model.num_kv_heads={self.num_kv_heads}: every key head serves as many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs")

    @property
    def vision_vocab_size(self) -> int:
        """Rows of the vision table: the codes, eof, eov and LWM's spare rows; 0 without vision."""
        return self.vision_codebook_size + SPARE_VISION_IDS if self.vision_codebook_size else 0

    @property
    def eof_id(self) -> int:
        """Vision id that ends a frame that is not the last of its clip."""
        return self.vision_codebook_size

    @property
    def eov_id(self) -> int:
        """Vision id that ends the last frame of a clip."""
        return self.vision_codebook_size + 1

    def num_parameters(self) -> int:
        """Trainable parameters, tied tables counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        text = self.text_vocab_size * self.hidden_size * (1 if self.tie_text_embeddings else 2)
        vision = (
            self.vision_vocab_size * self.hidden_size * (1 if self.tie_vision_embeddings else 2)
        )
        return self.num_layers * layer + self.hidden_size + text + vision


def can_split_heads(num_heads: int, num_kv_heads: int, heads_size: int) -> bool:
    """Whether ``heads_size`` ranks can share the heads equally; see ``check_head_split``."""
    fits = num_kv_heads % heads_size == 0 or heads_size % num_kv_heads == 0
    return num_heads % heads_size == 0 and fits


def check_head_split(num_heads: int, num_kv_heads: int, heads_size: int) -> None:
    """Refuse attention heads that ``heads_size`` ranks cannot share equally.

    ``heads_size`` must divide the query heads, and divide the key heads or be a multiple of them:
    where there are fewer key heads than ranks, several ranks work with the same one.

    Args:
        num_heads: query heads, a multiple of ``num_kv_heads``.
        num_kv_heads: key and value heads.
        heads_size: ranks that split the heads.

    Raises:
        ValueError: they cannot; lists the sizes that can.
    """
    if not can_split_heads(num_heads, num_kv_heads, heads_size):
        possible = (
            n for n in range(1, num_heads + 1) if can_split_heads(num_heads, num_kv_heads, n)
        )
        sizes = ", ".join(str(n) for n in possible)
        raise ValueError(
            f"{heads_size} workers cannot split {num_heads} query heads and {num_kv_heads} key "
            f"heads equally; take one of {sizes}"
        )


def _llama(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **more: object
) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        **more,  # type: ignore[arg-type]
    )


PRESETS: dict[str, ModelConfig] = {
    # Ours: what two CPU cores train in minutes.
    "tiny": _llama(128, 256, 2, 2, 2, text_vocab_size=1_024, vision_codebook_size=512),
    # LWM's table (lwm/llama.py): names, shapes and epsilons as released.
    "debug": _llama(256, 256, 2, 2, 2, rope_form="interleaved"),
    "200m": _llama(1_024, 2_048, 14, 8, 8, rope_form="interleaved"),
    "1b": _llama(2_048, 5_504, 22, 16, 16, rope_form="interleaved"),
    "3b": _llama(3_200, 8_640, 26, 32, 32, rope_form="interleaved"),
    "7b": _llama(4_096, 11_008, 32, 32, 32, rope_form="interleaved"),
    "13b": _llama(5_120, 13_824, 40, 40, 40, rope_form="interleaved"),
    "30b": _llama(6_656, 17_920, 60, 52, 52, rope_form="interleaved"),
    "65b": _llama(8_192, 22_016, 80, 64, 64, rope_form="interleaved", norm_eps=1e-5),
    # Hugging Face's Llama family.
    "llama2-7b": _llama(4_096, 11_008, 32, 32, 32, norm_eps=1e-5),
    "llama2-13b": _llama(5_120, 13_824, 40, 40, 40, norm_eps=1e-5),
    "llama3-8b": _llama(4_096, 14_336, 32, 32, 8, text_vocab_size=128_256, norm_eps=1e-5),
    "llama3.2-1b": _llama(
        2_048,
        8_192,
        16,
        32,
        8,
        text_vocab_size=128_256,
        norm_eps=1e-5,
        tie_text_embeddings=True,
        rope_scaling=RopeScaling(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8_192,
        ),
    ),
}

LLAMA_ROPE_THETA = 1e4
"""What LWM's presets and Llama 2 were released with; a folder that names none means it too."""


def preset_rope_theta(name: str) -> float:
    """The rope_theta that a preset's namesake was released with; a stage always names its own."""
    return 5e5 if name.startswith("llama3") else LLAMA_ROPE_THETA


def preset(name: str, **overrides: object) -> ModelConfig:
    """The preset ``name`` with some fields replaced.

    Args:
        name: a key of ``PRESETS``.
        **overrides: fields of ModelConfig; ``None`` keeps the preset's value.

    Raises:
        KeyError: no such preset.
        ValueError: the replaced shape is impossible.
    """
    chosen = {key: value for key, value in overrides.items() if value is not None}
    reshaped = {"hidden_size", "num_heads"} & chosen.keys()
    if reshaped and "head_dim" not in chosen:
        chosen["head_dim"] = 0
    return replace(PRESETS[name], **chosen)  # type: ignore[arg-type]


CONFIG_FIELDS = tuple(field.name for field in fields(ModelConfig))
