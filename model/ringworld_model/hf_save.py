"""Writes weights in Hugging Face's Llama layout: streamed, sharded, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringworld_model.config import ModelConfig
from ringworld_model.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    OWN_CONFIG,
    OWN_FOLDER,
    WeightsError,
    config_json,
    own_json,
)
from ringworld_model.hf_layout import (
    OWN_VISION,
    SAFETENSORS,
    Shape,
    hf_name,
    is_vision,
    parameter_shapes,
    turned_by_rope,
)
from ringworld_model.rope import reorder_pairs
from ringworld_model.transformer import WorldModel

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}
MAX_SHARD_BYTES = 4 * 2**30
# Llama's own length, and what Llama 3.1 made of its original one: for a model that names none.
_CONTEXT_LENGTH, _SCALED_LENGTHS = 4096, 16
_PADDING = 8

ReadParameter = Callable[[str], Tensor]
"""A WorldModel's parameter by name, whole, on any device, of any float dtype."""


def save_pretrained(
    model: WorldModel,
    folder: Path | str,
    *,
    rope_theta: float | None = None,
    context_length: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> list[Path]:
    """Write a model so that ``transformers`` loads its text part with equal logits.

    Vision tables and what config.json has no field for go to the subfolder ``ringworld``, so that
    ``from_pretrained`` gives the same model back, bit for bit.

    Args:
        model: with whole parameters.
        folder: to write; it must not exist yet, or be empty.
        rope_theta: written to config.json; the model's own where None.
        context_length: tokens of the longest row it was trained on, for max_position_embeddings;
            None writes 4,096, or 16 times the original length of a model with rope_scaling.
        dtype: of the weights; that of the text table where None.
        max_shard_bytes: most bytes of tensors in a file; a larger tensor has a file to itself.
        bos_token_id: written where given, to generation_config.json too.
        eos_token_id: likewise; one or several.

    Returns:
        The files, config.json first.

    Raises:
        WeightsError: the folder is not empty, its disk lacks the room, or the shape is none that
            ``transformers`` takes.
    """
    parameters = dict(model.named_parameters())
    return write_pretrained(
        folder,
        model.config,
        lambda name: parameters[name],
        rope_theta=model.rope_theta if rope_theta is None else rope_theta,
        context_length=context_length,
        dtype=model.text_embed.weight.dtype if dtype is None else dtype,
        max_shard_bytes=max_shard_bytes,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def write_pretrained(
    folder: Path | str,
    config: ModelConfig,
    read: ReadParameter,
    *,
    rope_theta: float,
    context_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    finish: Callable[[Path], object] | None = None,
) -> list[Path]:
    """Write a model whose parameters come one at a time, from wherever ``read`` takes them.

    The other arguments, the result and what is raised are those of ``save_pretrained``.

    Args:
        folder: to write.
        config: the shape.
        read: asked for every parameter of the shape once, in the order of the files.
        rope_theta: of the stage that trained it last.
        context_length: of that stage.
        dtype: of the weights.
        max_shard_bytes: most bytes of tensors in a file.
        bos_token_id: of the tokenizer.
        eos_token_id: likewise.
        finish: writes further files, such as a tokenizer's, before the folder gets its name.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise WeightsError(f"dtype={dtype}: weights are written as {names}")
    if max_shard_bytes < 1:
        raise WeightsError(f"max_shard_bytes={max_shard_bytes} is below 1")
    if config.hidden_size % config.num_heads:
        raise WeightsError(
            f"model.hidden_size={config.hidden_size} is not divisible by "
            f"model.num_heads={config.num_heads}, and transformers takes no such Llama"
        )
    if context_length is None:
        scaling = config.rope_scaling
        original = scaling.original_max_position_embeddings if scaling else 0
        context_length = max(_CONTEXT_LENGTH, _SCALED_LENGTHS * original)
    shapes = parameter_shapes(config)
    _require_room(folder, sum(map(prod, shapes.values())) * dtype.itemsize)
    scratch = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    scratch.mkdir(parents=True)
    try:
        about = config_json(
            config,
            rope_theta=rope_theta,
            max_position_embeddings=context_length,
            dtype=str(dtype).removeprefix("torch."),
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )
        _write_json(scratch / CONFIG_FILE, about)
        if bos_token_id is not None or eos_token_id is not None:
            ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
            _write_json(scratch / GENERATION_FILE, {k: v for k, v in ids.items() if v is not None})
        _write_text_weights(scratch, config, shapes, read, dtype, max_shard_bytes)
        _write_own(scratch, config, shapes, read, dtype)
        if finish is not None:
            finish(scratch)
        scratch.replace(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _sync_folder(folder.parent)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.name != CONFIG_FILE)


def _write_text_weights(
    folder: Path,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    read: ReadParameter,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    def theirs(name: str) -> Tensor:
        tensor = read(name)
        if config.rope_form == "interleaved" and turned_by_rope(name):
            tensor = reorder_pairs(tensor.detach(), config.head_dim, to="half")
        return tensor

    text = {name: shape for name, shape in shapes.items() if not is_vision(name)}
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in text.items():
        size = prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    stem = SAFETENSORS.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = SAFETENSORS
        weight_map |= {hf_name(name): file for name in shard}
        write_safetensors(folder / file, shard, theirs, dtype, hf_name)
    if len(shards) > 1:
        total = sum(map(prod, text.values())) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{SAFETENSORS}.index.json", index)


def _write_own(
    folder: Path,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    read: ReadParameter,
    dtype: torch.dtype,
) -> None:
    (folder / OWN_FOLDER).mkdir()
    _write_json(folder / OWN_CONFIG, own_json(config))
    vision = {name: shape for name, shape in shapes.items() if is_vision(name)}
    if vision:
        write_safetensors(folder / OWN_VISION, vision, read, dtype, str)
    _sync_folder(folder / OWN_FOLDER)
    _sync_folder(folder)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Shape],
    read: ReadParameter,
    dtype: torch.dtype,
    rename: Callable[[str], str],
) -> None:
    """Write a safetensors file tensor by tensor; only one of them is ever in memory.

    Args:
        path: of the new file.
        shapes: of the tensors, in the order of the file.
        read: gives each of them.
        dtype: that they are written in.
        rename: from their names to those in the file.

    Raises:
        WeightsError: ``read`` gave another shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        place = [offset, end]
        header[rename(name)] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": place}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PADDING)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = read(name).detach()
            if tuple(tensor.shape) != shape:
                raise WeightsError(f"{name} is {list(tensor.shape)} and not {list(shape)}")
            plain = tensor.to("cpu", dtype).contiguous()
            file.write(plain.view(torch.uint8).numpy().data)
            del tensor, plain  # before the next one is read
        file.flush()
        os.fsync(file.fileno())


def _require_room(folder: Path, needed_bytes: int) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise WeightsError(f"{folder} is not empty; give a new folder, or empty that one")
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{folder} is a file; give a new folder")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise WeightsError(
            f"{folder}: the weights need {needed_bytes:,} bytes and the disk has {free_bytes:,} "
            "free; choose another disk, or dtype bfloat16"
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
