"""Weights of the Large World Model's release, from its JAX layout, without JAX and without pickle.

Kernels are stored input first and are turned over; layers are stacked on one axis or apart. LWM
pairs RoPE's dims interleaved, so queries and keys go into an interleaved model as they are. One
layer's tensor at a time is in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringworld_model.config import ModelConfig
from ringworld_model.hf import LoadedWeights, NamedTensors, fill_parameters
from ringworld_model.hf_config import WeightsError
from ringworld_model.hf_layout import Shape, parameter_shapes, turned_by_rope
from ringworld_model.lwm_file import ITEM_BYTES, Key, StoredArray, find_file, read_index
from ringworld_model.lwm_layout import Place, places
from ringworld_model.rope import reorder_pairs
from ringworld_model.transformer import WorldModel, draw_weight

__all__ = ["from_lwm", "load_lwm", "read_lwm"]

log = logging.getLogger(__name__)


def from_lwm(
    path: Path | str,
    config: ModelConfig,
    *,
    rope_theta: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **options: Any,
) -> WorldModel:
    """Build a WorldModel from a parameter file of LWM's release.

    Args:
        path: the file (``params``, ``streaming_params``), or its folder. metadata.pkl beside it is
            never opened.
        config: the shape, which the file does not say: ``preset("7b")``.
        rope_theta: of the stage that trained it: 5e7 for LWM-1M.
        dtype: of the parameters.
        device: of the parameters.
        seed: of vision tables that a text-only file does not have.
        **options: of ``WorldModel``.

    Raises:
        WeightsError: as in ``load_lwm``.
    """
    with torch.device("meta"):
        model = WorldModel(config, rope_theta=rope_theta, **options)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    log.info("%s", load_lwm(model, path, seed=seed))
    return model


def load_lwm(model: WorldModel, path: Path | str, *, seed: int = 0) -> LoadedWeights:
    """Fill a model's parameters from a parameter file of LWM's release.

    Args:
        model: with whole parameters on any device, of any float dtype, of either RoPE form.
        path: as in ``from_lwm``.
        seed: of the vision tables that the file does not have.

    Raises:
        WeightsError: as in ``read_lwm``.
    """
    loaded, tensors = read_lwm(model.config, path, seed=seed)
    fill_parameters(model, tensors)
    return loaded


def read_lwm(
    config: ModelConfig, path: Path | str, *, seed: int = 0
) -> tuple[LoadedWeights, NamedTensors]:
    """Open a parameter file of LWM's release, to be read one tensor at a time.

    Args:
        config: of the model that the weights are for, of either RoPE form.
        path: as in ``from_lwm``.
        seed: of the vision tables that the file does not have.

    Returns:
        As ``read_pretrained``.

    Raises:
        WeightsError: the file is damaged or no such file, or a tensor is missing, not expected or
            of another shape or dtype; all of them are named, before the first is read.
    """
    file = find_file(Path(path))
    index = read_index(file)
    found = places(config, index, file)
    shapes = parameter_shapes(config)
    drawn = tuple(name for name in shapes if name not in found)
    used = {place.key for place in found.values()}
    left = tuple("/".join(key) for key in index if key not in used)

    def tensors() -> NamedTensors:
        with file.open("rb") as opened:
            # In the file's order, so that the disk reads ahead.
            for name, place in sorted(found.items(), key=lambda item: _offset(index, item[1])):
                shape = shapes[name][::-1] if place.turned else shapes[name]
                tensor = _read(opened, index[place.key], place.layer, shape)
                if place.turned:
                    tensor = tensor.T
                if config.rope_form == "half" and turned_by_rope(name):
                    tensor = reorder_pairs(tensor, config.head_dim, to="half")
                yield name, tensor
                del tensor  # before the next one is read
        for name in drawn:
            yield name, draw_weight(name, shapes[name], config, seed)

    return LoadedWeights(f"lwm:{file}", drawn, left), tensors()


def _offset(index: Mapping[Key, StoredArray], place: Place) -> tuple[int, int]:
    return index[place.key].chunks[0][0], place.layer or 0


def _read(file: BufferedReader, array: StoredArray, layer: int | None, shape: Shape) -> Tensor:
    """An array, or one layer of a stacked one; its bytes may lie in several chunks."""
    length = prod(shape) * ITEM_BYTES[array.dtype]
    start = (layer or 0) * length
    data = bytearray(length)
    view, first = memoryview(data), 0
    for offset, size in array.chunks:
        low, high = max(start, first), min(start + length, first + size)
        if low < high:
            file.seek(offset + low - first)
            if file.readinto(view[low - start : high - start]) != high - low:
                raise WeightsError(f"{file.name}: cut off while it was read; copy it anew")
        first += size
    return torch.frombuffer(data, dtype=getattr(torch, array.dtype)).view(shape)
