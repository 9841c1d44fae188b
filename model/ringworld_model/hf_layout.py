"""Where each parameter stands in other layouts, and in which files. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ringworld_model.config import ModelConfig
from ringworld_model.hf_config import OWN_FOLDER, WeightsError

Shape = tuple[int, ...]

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
OWN_VISION = f"{OWN_FOLDER}/vision.safetensors"

TABLES = {
    "text_embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "text_head.weight": "lm_head.weight",
}
LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""Part of a decoder layer, and its name in Hugging Face's Llama."""


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of a WorldModel and its shape; tied heads, which have none, are left out."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {"text_embed.weight": (config.text_vocab_size, hidden)}
    if config.vision_vocab_size:
        shapes["vision_embed.weight"] = (config.vision_vocab_size, hidden)
    layer: dict[str, Shape] = {
        "attention_norm": (hidden,),
        "attention.q_proj": (queries, hidden),
        "attention.k_proj": (keys, hidden),
        "attention.v_proj": (keys, hidden),
        "attention.o_proj": (hidden, queries),
        "mlp_norm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{part}.weight": shape for part, shape in layer.items()}
    shapes["norm.weight"] = (hidden,)
    if not config.tie_text_embeddings:
        shapes["text_head.weight"] = (config.text_vocab_size, hidden)
    if config.vision_vocab_size and not config.tie_vision_embeddings:
        shapes["vision_head.weight"] = (config.vision_vocab_size, hidden)
    return shapes


def is_vision(parameter: str) -> bool:
    """Whether a parameter is a vision table or head, which Llama has none of."""
    return parameter.startswith("vision_")


def turned_by_rope(parameter: str) -> bool:
    """Whether the parameter's output rows are dims that RoPE pairs."""
    return parameter.endswith(("attention.q_proj.weight", "attention.k_proj.weight"))


def split_layer(parameter: str) -> tuple[int, str] | None:
    """Layer and part: ``layers.3.mlp.up_proj.weight`` gives (3, "mlp.up_proj"); None elsewhere."""
    if not parameter.startswith("layers."):
        return None
    _, index, part = parameter.split(".", 2)
    return int(index), part.removesuffix(".weight")


def hf_name(parameter: str) -> str:
    """A text parameter's name in Hugging Face's Llama.

    Args:
        parameter: of ``parameter_shapes``, no vision one.
    """
    place = split_layer(parameter)
    if place is None:
        return TABLES[parameter]
    return f"model.layers.{place[0]}.{LAYER[place[1]]}.weight"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of weights.

    Attributes:
        path: of the file.
        names: the tensors that the index takes from it; None where there is no index: all.
    """

    path: Path
    names: frozenset[str] | None


def weight_files(folder: Path) -> list[WeightFile]:
    """The files that hold a folder's weights: safetensors before .bin, sharded by an index or one.

    Raises:
        WeightsError: there are none, the index is no index, or a file that it names is not there.
    """
    for name in (SAFETENSORS, BIN):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _sharded(folder, index)
        if (folder / name).is_file():
            return [WeightFile(folder / name, None)]
    raise WeightsError(
        f"{folder}: it holds neither {SAFETENSORS} nor {BIN}, nor an index of their shards"
    )


def _sharded(folder: Path, index: Path) -> list[WeightFile]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(str(file), set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of shards ({error!r})") from error
    outside = [file for file in by_file if Path(file).name != file]
    if outside:
        raise WeightsError(f"{index}: names {outside[0]!r}, which is not a file of its folder")
    missing = [file for file in sorted(by_file) if not (folder / file).is_file()]
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} of {len(by_file)} shards are missing: "
            f"{', '.join(missing[:4])}; copy the whole folder"
        )
    return [WeightFile(folder / file, frozenset(by_file[file])) for file in sorted(by_file)]
