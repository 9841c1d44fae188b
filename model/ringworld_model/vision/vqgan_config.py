"""The shape of a VQGAN, read from and written as the config.json of diffusers' VQModel."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
CLASS_NAME = "VQModel"
IGNORED = ("sample_size", "scaling_factor", "lookup_from_codebook", "force_upcast")
"""Fields of VQModel that change neither codes nor frames."""

LWM_FRAME_SIZE = 256
"""Pixels of a side where a config.json does not say: the Large World Model's."""

_FIXED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "norm_type": "group",
    "mid_block_add_attention": False,
}
_VQMODEL_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "norm_type": "group",
    "mid_block_add_attention": True,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}


@dataclass(frozen=True, slots=True)
class VQGANConfig:
    """Shape of a VQGAN; the defaults are those of aMUSEd, which the Large World Model uses.

    Attributes:
        block_out_channels: channels of each level; every level but the first halves the frame.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        latent_channels: width of a code's vector.
        codebook_size: codes.
        norm_num_groups: groups of the group norms; divides every level's channels.
        frame_size: pixels of a side of a frame; the network itself takes any multiple of
            ``downsampling``.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    layers_per_block: int = 2
    latent_channels: int = 64
    codebook_size: int = 8192
    norm_num_groups: int = 32
    frame_size: int = LWM_FRAME_SIZE

    def __post_init__(self) -> None:
        """Refuse a shape that does not add up.

        Raises:
            ValueError: names the value and the rule.
        """
        for name in ("layers_per_block", "latent_channels", "codebook_size", "norm_num_groups"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is no whole number of at least 1")
        if not self.block_out_channels:
            raise ValueError("block_out_channels is empty; give the channels of each level")
        for channels in self.block_out_channels:
            if type(channels) is not int or channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels={list(self.block_out_channels)}: {channels!r} is not "
                    f"divisible by norm_num_groups={self.norm_num_groups}"
                )
        if (
            type(self.frame_size) is not int
            or self.frame_size < 1
            or self.frame_size % self.downsampling
        ):
            raise ValueError(
                f"frame_size={self.frame_size!r} is no multiple of {self.downsampling}, by which "
                f"{len(self.block_out_channels)} levels shrink a frame"
            )

    @property
    def downsampling(self) -> int:
        """Pixels of a side that one code stands for."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def codes_per_side(self) -> int:
        """Codes along a side of a frame."""
        return self.frame_size // self.downsampling

    @property
    def codes_per_frame(self) -> int:
        """Codes of one frame."""
        return self.codes_per_side**2

    def to_json(self) -> dict[str, Any]:
        """The config.json of a VQModel, and ``frame_size``, which diffusers passes over."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": CLASS_NAME,
            **_FIXED,
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "lookup_from_codebook": True,
            "norm_num_groups": self.norm_num_groups,
            "num_vq_embeddings": self.codebook_size,
            "vq_embed_dim": None,
            "frame_size": self.frame_size,
        }

    @classmethod
    def read(cls, folder: Path) -> VQGANConfig:
        """Read a folder's config.json.

        A VQModel takes frames of any size, so where the file does not say ``frame_size`` it is 256,
        as in the Large World Model.

        Raises:
            ValueError: no VQModel, or one with a part that is not built here; names both.
        """
        path = folder / CONFIG_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        try:
            return _from_json(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _from_json(data: Any) -> VQGANConfig:
    found = data.get("_class_name") if isinstance(data, dict) else None
    if found != CLASS_NAME:
        raise ValueError(f"_class_name={found!r}; only {CLASS_NAME} can be loaded")
    given = {key: value for key, value in data.items() if not key.startswith("_")}
    known = {*_VQMODEL_DEFAULTS, *IGNORED, "frame_size"}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; is it {near[0]}?" if near else ""
            raise ValueError(f"unknown field {key}={given[key]!r}{hint}")
    values = {**_VQMODEL_DEFAULTS, **given}
    for key, only in _FIXED.items():
        if values[key] != only:
            raise ValueError(f"{key}={values[key]!r} is not built here; only {only!r} is")
    channels = values["block_out_channels"]
    if not isinstance(channels, list):
        raise ValueError(f"block_out_channels={channels!r} is no list of numbers")
    for key, only in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if values[key] != [only] * len(channels):
            raise ValueError(f"{key}={values[key]!r}; only {only}, once for each level, is built")
    if values["vq_embed_dim"] not in (None, values["latent_channels"]):
        raise ValueError(
            f"vq_embed_dim={values['vq_embed_dim']!r} is not built here; "
            f"only latent_channels={values['latent_channels']!r} is"
        )
    return VQGANConfig(
        block_out_channels=tuple(channels),
        layers_per_block=values["layers_per_block"],
        latent_channels=values["latent_channels"],
        codebook_size=values["num_vq_embeddings"],
        norm_num_groups=values["norm_num_groups"],
        frame_size=values.get("frame_size", LWM_FRAME_SIZE),
    )
