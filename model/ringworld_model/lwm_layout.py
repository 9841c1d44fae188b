"""Where each parameter stands in the Large World Model's file. Imports no torch.

Source: lwm/llama.py and lwm/vision_llama.py of the release name the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ringworld_model.config import SPARE_VISION_IDS, ModelConfig
from ringworld_model.hf_config import WeightsError, few
from ringworld_model.hf_layout import Shape, is_vision, parameter_shapes, split_layer
from ringworld_model.lwm_file import ITEM_BYTES, Key, StoredArray

TABLES: dict[str, Key] = {
    "text_embed.weight": ("transformer", "wte", "embedding"),
    "vision_embed.weight": ("transformer", "vte", "embedding"),
    "norm.weight": ("transformer", "ln_f", "kernel"),
    "text_head.weight": ("lm_head", "kernel"),
    "vision_head.weight": ("vision_head", "kernel"),
}
LAYER: dict[str, Key] = {
    "attention_norm": ("attention_norm", "kernel"),
    "attention.q_proj": ("attention", "wq", "kernel"),
    "attention.k_proj": ("attention", "wk", "kernel"),
    "attention.v_proj": ("attention", "wv", "kernel"),
    "attention.o_proj": ("attention", "wo", "kernel"),
    "mlp_norm": ("ffn_norm", "kernel"),
    "mlp.gate_proj": ("feed_forward", "w1", "kernel"),
    "mlp.up_proj": ("feed_forward", "w3", "kernel"),
    "mlp.down_proj": ("feed_forward", "w2", "kernel"),
}
STACKED = ("transformer", "h", "scan_decoder")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter is.

    Attributes:
        key: of the array.
        layer: index on the array's first axis, where layers are stacked; else None.
        turned: stored [in, out], to be transposed.
    """

    key: Key
    layer: int | None
    turned: bool


def place_of(parameter: str, stacked: bool) -> Place:
    """Where a parameter of ``parameter_shapes`` is, with layers stacked or apart."""
    found = split_layer(parameter)
    if found is None:
        return Place(TABLES[parameter], None, parameter.endswith("_head.weight"))
    index, part = found
    turned = part.endswith("_proj")
    if stacked:
        return Place((*STACKED, *LAYER[part]), index, turned)
    return Place(("transformer", "h", str(index), *LAYER[part]), None, turned)


def places(config: ModelConfig, index: Mapping[Key, StoredArray], file: Path) -> dict[str, Place]:
    """Where every parameter of a model is in a file; vision ones only where the file has them.

    Args:
        config: the model's shape.
        index: of the file.
        file: for messages.

    Raises:
        WeightsError: a tensor is missing, not expected, or of another shape or dtype; names them.
    """
    stacked = any(key[: len(STACKED)] == STACKED for key in index)
    shapes = parameter_shapes(config)
    wanted = {name: place_of(name, stacked) for name in shapes}
    has_vision = any(key in index for name, key in TABLES.items() if is_vision(name))
    if not has_vision:
        wanted = {name: place for name, place in wanted.items() if not is_vision(name)}
    problems = []
    keys = dict.fromkeys(place.key for place in wanted.values())
    if missing := ["/".join(key) for key in keys if key not in index]:
        problems.append(f"missing: {few(missing)}")
    # A text-only model leaves vision tables where they are.
    unused = {
        key for name, key in TABLES.items() if is_vision(name) and not config.vision_vocab_size
    }
    allowed = keys.keys() | unused
    if unexpected := ["/".join(key) for key in index if key not in allowed]:
        problems.append(f"not expected: {few(unexpected)}")
    other = {}
    for name, place in wanted.items():
        array = index.get(place.key)
        if array is None:
            continue
        shape: Shape = shapes[name][::-1] if place.turned else shapes[name]
        if place.layer is not None:
            shape = (config.num_layers, *shape)
        if array.shape != shape:
            other[place.key] = f"{'/'.join(place.key)} is {list(array.shape)} and not {list(shape)}"
        elif array.dtype not in ITEM_BYTES:
            other[place.key] = f"{'/'.join(place.key)} is {array.dtype}"
    if other:
        problems.append(f"of another shape: {few(list(other.values()))}")
    if problems:
        raise WeightsError(
            f"{file}: {'; '.join(problems)}; the weights are of another model than the config says"
        )
    return wanted


def table_sizes(index: Mapping[Key, StoredArray]) -> tuple[int | None, int | None]:
    """Rows of a file's text table and codes of its vision table; None for one that it lacks."""
    text, vision = (
        index.get(TABLES[name]) for name in ("text_embed.weight", "vision_embed.weight")
    )
    codes = vision.shape[0] - SPARE_VISION_IDS if vision and vision.shape else None
    return text.shape[0] if text and text.shape else None, codes
