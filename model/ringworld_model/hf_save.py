"""Writes weights in Hugging Face's Llama layout: streamed and sharded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
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
from ringworld_model.hf_sink import FolderSink, Sink
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
    files = write_pretrained(
        FolderSink(folder),
        model.config,
        lambda name: parameters[name],
        rope_theta=model.rope_theta if rope_theta is None else rope_theta,
        context_length=context_length,
        dtype=model.text_embed.weight.dtype if dtype is None else dtype,
        max_shard_bytes=max_shard_bytes,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    return [Path(folder) / name for name in files]


def write_pretrained(
    sink: Sink,
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
) -> dict[str, int]:
    """Write a model whose parameters come one at a time, from wherever ``read`` takes them.

    config.json is written last: without it nobody takes the files for a model.

    Args:
        sink: where the files go.
        config: the shape.
        read: asked for every parameter of the shape once, in the order of the files.
        rope_theta: of the stage that trained it last.
        context_length: of that stage.
        dtype: of the weights.
        max_shard_bytes: most bytes of tensors in a file.
        bos_token_id: of the tokenizer.
        eos_token_id: likewise.
        finish: writes further files, such as a tokenizer's, into the folder that it is given.

    Returns:
        Bytes of the files by name, config.json first.

    Raises:
        WeightsError: as ``save_pretrained``.
    """
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
    about = config_json(
        config,
        rope_theta=rope_theta,
        max_position_embeddings=context_length,
        dtype=str(dtype).removeprefix("torch."),
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    sink.open(sum(map(prod, shapes.values())) * dtype.itemsize)
    try:
        _write_own(sink, config, shapes, read, dtype)
        index = _write_text_weights(sink, config, shapes, read, dtype, max_shard_bytes)
        if bos_token_id is not None or eos_token_id is not None:
            ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
            known = {name: value for name, value in ids.items() if value is not None}
            _write_json(sink, GENERATION_FILE, known)
        if finish is not None:
            sink.write_folder(finish)
        if index is not None:
            _write_json(sink, f"{SAFETENSORS}.index.json", index)
        _write_json(sink, CONFIG_FILE, about)
        files = sink.commit()
    except BaseException:
        sink.abort()
        raise
    return {CONFIG_FILE: files[CONFIG_FILE], **files}


def _write_text_weights(
    sink: Sink,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    read: ReadParameter,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> dict[str, Any] | None:
    """Returns the index of several shards, for the caller to write once they are all there."""

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
        sink.write(file, safetensors_chunks(shard, theirs, dtype, hf_name))
    if len(shards) == 1:
        return None
    total = sum(map(prod, text.values())) * dtype.itemsize
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_own(
    sink: Sink,
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    read: ReadParameter,
    dtype: torch.dtype,
) -> None:
    _write_json(sink, OWN_CONFIG, own_json(config))
    vision = {name: shape for name, shape in shapes.items() if is_vision(name)}
    if vision:
        sink.write(OWN_VISION, safetensors_chunks(vision, read, dtype, str))


def safetensors_chunks(
    shapes: Mapping[str, Shape],
    read: ReadParameter,
    dtype: torch.dtype,
    rename: Callable[[str], str],
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor; only one of them is ever in memory.

    Args:
        shapes: of the tensors, in the order of the file.
        read: gives each of them.
        dtype: that they are written in.
        rename: from their names to those in the file.

    Yields:
        The header, then the bytes of each tensor, which is gone when the next one is read, if the
        caller has let it go.

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
    yield struct.pack("<Q", len(text)) + text
    for name, shape in shapes.items():
        tensor = read(name).detach()
        if tuple(tensor.shape) != shape:
            raise WeightsError(f"{name} is {list(tensor.shape)} and not {list(shape)}")
        tensor = tensor.to("cpu", dtype).reshape(-1)
        yield tensor.view(torch.uint8).numpy().data
        del tensor  # before the next one is read


def _write_json(sink: Sink, name: str, content: Mapping[str, Any]) -> None:
    sink.write(name, [json.dumps(content, indent=2).encode() + b"\n"])
