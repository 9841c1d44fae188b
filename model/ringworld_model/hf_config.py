"""config.json of a Llama-family checkpoint, in and out. Imports no torch: jobs are checked with it.

Two spellings of RoPE are about: ``rope_theta`` beside ``rope_scaling``, and both inside
``rope_parameters`` (transformers 5). Either is read, both are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ringworld_model.config import LLAMA_ROPE_THETA, ModelConfig, RopeForm, RopeScaling

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
OWN_FOLDER = "ringworld"
"""Subfolder for what Llama has no place for; tools that take every file of the folder miss it."""
OWN_CONFIG = f"{OWN_FOLDER}/model.json"
OWN_FORMAT = 1
_MOST_NAMES = 6
ARCHITECTURE = "LlamaForCausalLM"

# Fields that change the computation, with the one value that a WorldModel computes.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "sliding_window": None,
}
_SIZES = {
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "text_vocab_size": "vocab_size",
}


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file, the field or tensor, the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """What a folder says of its weights.

    Attributes:
        config: their shape; without vision unless the folder holds vision tables of ours.
        rope_theta: that they were trained with last.
        max_position_embeddings: tokens of the longest row that they were made for.
    """

    config: ModelConfig
    rope_theta: float
    max_position_embeddings: int


def few(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are, for a message."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def read_config(folder: Path | str) -> Pretrained:
    """Read config.json, and our own model.json where the folder has one.

    Args:
        folder: of a checkpoint in Hugging Face's layout.

    Raises:
        WeightsError: no such file, another architecture, or a field that a WorldModel does not
            compute; names every such field and its value.
    """
    path = Path(folder) / CONFIG_FILE
    given = _read_json(path)
    problems: list[str] = []
    architectures = given.get("architectures") or [ARCHITECTURE]
    if given.get("model_type") != "llama" or ARCHITECTURE not in architectures:
        named = f"model_type={given.get('model_type')!r}, architectures={architectures!r}"
        raise WeightsError(f"{path}: {named}; only {ARCHITECTURE} (model_type 'llama') is read")
    for field, value in _ONLY.items():
        if given.get(field, value) != value:
            problems.append(f"{field}={given[field]!r} (only {value!r} is read)")
    sizes = {ours: _size(given, theirs, problems) for ours, theirs in _SIZES.items()}
    sizes["num_kv_heads"] = sizes["num_heads"]
    if given.get("num_key_value_heads") is not None:
        sizes["num_kv_heads"] = _size(given, "num_key_value_heads", problems)
    if given.get("head_dim") is not None:
        sizes["head_dim"] = _size(given, "head_dim", problems)
    numbers = {
        "norm_eps": _number(given, "rms_norm_eps", 1e-6, problems),
        "init_std": _number(given, "initializer_range", 0.02, problems),
    }
    rope_theta, scaling = _read_rope(given, problems)
    if problems:
        raise WeightsError(f"{path}: {'; '.join(problems)}")
    try:
        config = ModelConfig(
            **cast(Any, sizes | numbers),
            vision_codebook_size=0,
            rope_scaling=scaling,
            tie_text_embeddings=bool(given.get("tie_word_embeddings", False)),
        )
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    return Pretrained(
        config=_with_own(Path(folder), config),
        rope_theta=rope_theta,
        max_position_embeddings=int(given.get("max_position_embeddings") or 2048),
    )


def config_json(
    config: ModelConfig,
    *,
    rope_theta: float,
    max_position_embeddings: int,
    dtype: str,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
) -> dict[str, Any]:
    """The config.json of a model's text part.

    Args:
        config: the shape.
        rope_theta: of the stage that trained it last.
        max_position_embeddings: tokens of the longest row that it was trained on.
        dtype: of the weights: float32, bfloat16, ...
        bos_token_id: written as null where None: Llama's own default need not be this tokenizer's.
        eos_token_id: likewise.
    """
    scaling = _scaling_json(config.rope_scaling)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.text_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_text_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope_theta, **(scaling or {"rope_type": "default"})},
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def own_json(config: ModelConfig) -> dict[str, Any]:
    """Our own model.json: what Llama's config.json has no field for."""
    return {
        "format": OWN_FORMAT,
        "rope_form": config.rope_form,
        "vision_codebook_size": config.vision_codebook_size,
        "tie_vision_embeddings": config.tie_vision_embeddings,
    }


def _with_own(folder: Path, config: ModelConfig) -> ModelConfig:
    path = folder / OWN_CONFIG
    if not path.exists():
        return config
    given = _read_json(path)
    if given.get("format") != OWN_FORMAT:
        raise WeightsError(
            f"{path}: format={given.get('format')!r}, and {OWN_FORMAT} is read; it was written by "
            "another version of ringworld: export the checkpoint anew"
        )
    form, codes = given.get("rope_form"), given.get("vision_codebook_size")
    if form not in ("half", "interleaved"):
        raise WeightsError(f"{path}: rope_form={form!r}; it is half or interleaved")
    if not isinstance(codes, int) or isinstance(codes, bool) or codes < 0:
        raise WeightsError(f"{path}: vision_codebook_size={codes!r}; it is 0 or more")
    return replace(
        config,
        rope_form=cast(RopeForm, form),
        vision_codebook_size=codes,
        tie_vision_embeddings=bool(given.get("tie_vision_embeddings", False)),
    )


def _read_rope(given: Mapping[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from either spelling; both must say the same where both are there."""
    new = given.get("rope_parameters") or {}
    old = given.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        problems.append(f"rope_parameters={new!r}, rope_scaling={old!r} (mappings are read)")
        return LLAMA_ROPE_THETA, None
    theta = _number({"rope_theta": LLAMA_ROPE_THETA, **given}, "rope_theta", 0, problems)
    if "rope_theta" in new:
        inner = _number(new, "rope_theta", 0, problems)
        if "rope_theta" in given and inner != theta:
            problems.append(
                f"rope_theta={theta:g} and rope_parameters.rope_theta={inner:g} disagree"
            )
        theta = inner
    for field, value in {**given, **new}.items():
        if field == "partial_rotary_factor" and value not in (None, 1, 1.0):
            problems.append(f"partial_rotary_factor={value!r} (only 1.0 is read)")
    found = [_read_scaling(part, problems) for part in (new, old) if part]
    if len(found) == 2 and found[0] != found[1]:
        problems.append(f"rope_scaling={old!r} and rope_parameters={new!r} disagree")
    return theta, found[0] if found else None


def _read_scaling(given: Mapping[str, Any], problems: list[str]) -> RopeScaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        problems.append(f"rope_scaling type {kind!r} (only 'llama3' and 'default' are read)")
        return None
    try:
        return RopeScaling(
            factor=float(given["factor"]),
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
            original_max_position_embeddings=int(given["original_max_position_embeddings"]),
        )
    except KeyError as error:
        problems.append(f"rope_scaling {error.args[0]} is missing")
    except (TypeError, ValueError) as error:
        problems.append(str(error).removeprefix("model."))
    return None


def _scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _size(given: Mapping[str, Any], field: str, problems: list[str]) -> int:
    value = given.get(field)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    problems.append(
        f"{field}={value!r} (a whole number of at least 1)"
        if field in given
        else f"{field} is missing"
    )
    return 1


def _number(given: Mapping[str, Any], field: str, default: float, problems: list[str]) -> float:
    value = given.get(field, default)
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    problems.append(f"{field}={value!r} (a number above 0)")
    return 1.0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        where = "no such folder" if not path.parent.is_dir() else f"it holds no {path.name}"
        raise WeightsError(
            f"{path.parent}: {where}; give the folder of a checkpoint in Hugging Face's layout"
        ) from None
    except OSError as error:
        raise WeightsError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return found
