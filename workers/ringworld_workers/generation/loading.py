"""A model with its weights and tokenizers; every rank of a ring loads its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from ringworld_model.hf import NamedTensors, fill_parameters, from_pretrained
from ringworld_model.transformer import WorldModel
from ringworld_workers.checkpoint.layout import CheckpointRef, Manifest
from ringworld_workers.checkpoint.range_reader import RangeReader
from ringworld_workers.checkpoint_tools.choose import manifest_of
from ringworld_workers.engine.base import OwnedRange
from ringworld_workers.generation.coder import Coder, load_coder
from ringworld_workers.generation.source import ModelSource
from ringworld_workers.store.opening import open_store

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of dtypes on the command line and in jobs."""


@dataclass(kw_only=True)
class LoadedModel(Coder):
    """A model that can be asked.

    Attributes:
        model: with whole parameters.
    """

    model: WorldModel


def choose_device(name: str = "auto") -> torch.device:
    """``auto``: the GPU where there is one, else the CPU; anything else as torch takes it.

    Args:
        name: auto, cpu, cuda, cuda:1.
    """
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bf16 on a GPU, fp32 on the CPU.

    Args:
        name: auto, or a key of ``DTYPES``.
        device: where the model computes.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(
    source: ModelSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    coder: Coder | None = None,
    on_tensor: Callable[[int, int], None] = lambda *_: None,
) -> LoadedModel:
    """Load weights and tokenizers. Each tensor is read, verified and copied before the next one.

    Args:
        source: of ``find_model``.
        device: of the parameters.
        dtype: of the parameters.
        coder: the tokenizers, if they are loaded already.
        on_tensor: told how many tensors of a checkpoint are done, and how many there are.

    Raises:
        RequestError, DataError: a tokenizer is missing, or not the model's.
        CheckpointError, StoreError: the checkpoint is damaged, or its store does not answer.
        WeightsError: the folder's weights cannot be read.
    """
    coder = coder or load_coder(source, device=str(device))
    if source.checkpoint is None:
        model = from_pretrained(
            source.folder, rope_theta=source.rope_theta, dtype=dtype, device=device
        )
    else:
        model = _empty(source, device, dtype)
        fill_parameters(model, _tensors(source.checkpoint, on_tensor))
    model.eval().requires_grad_(False)
    return LoadedModel(
        source=source,
        tokenizer=coder.tokenizer,
        codebook=coder.codebook,
        grammar=coder.grammar,
        template=coder.template,
        model=model,
    )


def _empty(source: ModelSource, device: torch.device | str, dtype: torch.dtype) -> WorldModel:
    with torch.device("meta"):
        model = WorldModel(source.config, rope_theta=source.rope_theta)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    return model


def _tensors(ref: CheckpointRef, on_tensor: Callable[[int, int], None]) -> NamedTensors:
    """A checkpoint's master weights, fp32 on the CPU, one at a time."""
    store = open_store(ref.url)
    manifest: Manifest = manifest_of(store, ref)
    reader = RangeReader(store, manifest)
    for done, (name, shape) in enumerate(manifest.tensors.items()):
        on_tensor(done, len(manifest.tensors))
        data = torch.empty(prod(shape), dtype=torch.float32)
        reader.read_into(OwnedRange(name, "param", shape, 0, data))
        yield name, data.view(shape)
        del data  # before the next one is made
