"""Weights from Hugging Face's Llama layout, and back (``save_pretrained``).

Tensors are read one at a time (of a .bin file, its pages as they are read), so that whoever takes a
part of each never holds the whole model (``read_pretrained``).
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringworld_model.config import ModelConfig
from ringworld_model.hf_config import WeightsError, few, read_config
from ringworld_model.hf_layout import (
    OWN_VISION,
    Shape,
    WeightFile,
    hf_name,
    is_vision,
    parameter_shapes,
    turned_by_rope,
    weight_files,
)
from ringworld_model.hf_save import save_pretrained
from ringworld_model.rope import reorder_pairs
from ringworld_model.transformer import WorldModel, draw_weight

__all__ = [
    "LoadedWeights",
    "NamedTensors",
    "WeightsError",
    "fill_parameters",
    "from_pretrained",
    "load_pretrained",
    "read_pretrained",
    "save_pretrained",
]

log = logging.getLogger(__name__)

# Tables that old checkpoints carry and that are computed here.
_COMPUTED = ".rotary_emb.inv_freq"

NamedTensors = Iterator[tuple[str, Tensor]]
"""Whole parameters and their names; a tensor may be let go when the next one is asked for."""


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What became of a model's parameters.

    Attributes:
        source: where the weights are from.
        drawn: parameters that the source does not have and that were drawn anew.
        left: tensors of the source that the model has no place for.
    """

    source: str
    drawn: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a log."""
        parts = [f"weights from {self.source}"]
        if self.drawn:
            parts.append(f"drawn anew: {few(self.drawn)}")
        if self.left:
            parts.append(f"left out: {few(self.left)}")
        return "; ".join(parts)


def from_pretrained(
    folder: Path | str,
    *,
    rope_theta: float | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    vision_codebook_size: int | None = None,
    config: ModelConfig | None = None,
    seed: int = 0,
    **options: Any,
) -> WorldModel:
    """Build a WorldModel from a Llama-family checkpoint on disk.

    Args:
        folder: with config.json and safetensors or .bin files, single or sharded. What
            ``save_pretrained`` wrote comes back bit for bit, vision tables and RoPE form too.
        rope_theta: base of the rotary embedding; the folder's where None.
        dtype: of the parameters; None keeps that of the folder's embedding table.
        device: of the parameters.
        vision_codebook_size: VQ codes of the vision table: None takes the folder's (0 in one that
            is not ours), 0 leaves it out. A table that the folder lacks is drawn from ``seed``.
        config: another form for the same weights: interleaved, without rope_scaling, another eps.
            Its text shapes must be the folder's.
        seed: of what is drawn.
        **options: of ``WorldModel``: activation_checkpointing, loss_tile_tokens.

    Raises:
        WeightsError: the folder is not what a WorldModel computes, or a tensor is missing, not
            expected or of another shape; all of them are named.
    """
    folder = Path(folder)
    found = read_config(folder)
    chosen = found.config if config is None else config
    if vision_codebook_size is not None:
        chosen = replace(chosen, vision_codebook_size=vision_codebook_size)
    theta = found.rope_theta if rope_theta is None else rope_theta
    with torch.device("meta"):
        model = WorldModel(chosen, rope_theta=theta, **options)
    if dtype is None:
        dtype = _dtype_of(weight_files(folder), hf_name("text_embed.weight"))
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    log.info("%s", load_pretrained(model, folder, seed=seed))
    return model


def load_pretrained(model: WorldModel, folder: Path | str, *, seed: int = 0) -> LoadedWeights:
    """Fill a model's parameters from a Llama-family checkpoint on disk.

    The model keeps its own dtype, rope_theta, norm_eps and rope_scaling, whatever the folder says.

    Args:
        model: with whole parameters on any device, of any float dtype.
        folder: as in ``from_pretrained``.
        seed: of the vision tables that the folder does not have.

    Raises:
        WeightsError: as in ``from_pretrained``; the model is then half filled only where a file is
            damaged: names and shapes are checked before the first tensor is read.
    """
    loaded, tensors = read_pretrained(model.config, folder, seed=seed)
    fill_parameters(model, tensors)
    return loaded


def read_pretrained(
    config: ModelConfig, folder: Path | str, *, seed: int = 0
) -> tuple[LoadedWeights, NamedTensors]:
    """Open a Llama-family checkpoint on disk, to be read one tensor at a time.

    The queries and keys are brought into the pairing of ``config``'s RoPE form.

    Args:
        config: of the model that the weights are for.
        folder: as in ``from_pretrained``.
        seed: of the vision tables that the folder does not have.

    Returns:
        What is in it, and every parameter of the model with its name, whole, on the CPU. Each is
        read or drawn when it is asked for.

    Raises:
        WeightsError: as in ``from_pretrained``, for names and shapes; the tensors raise it too,
            where a file is damaged.
    """
    folder = Path(folder)
    held = read_config(folder).config
    files = weight_files(folder)
    wanted = parameter_shapes(config)
    text = {hf_name(name): name for name in wanted if not is_vision(name)}
    shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
    tied = hf_name("text_head.weight") if config.tie_text_embeddings else None
    found = {n: s for n, s in shapes.items() if not n.endswith(_COMPUTED) and n != tied}
    _compare(folder, {theirs: wanted[ours] for theirs, ours in text.items()}, found)
    if tied is not None and tied in shapes:
        _require_tied(folder, files, tied, hf_name("text_embed.weight"))
    drawn: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    vision = {name: shape for name, shape in wanted.items() if is_vision(name)}
    own = WeightFile(folder / OWN_VISION, None)
    if held.vision_codebook_size:
        if vision:
            _compare(own.path, vision, _shapes(own))
            files = [*files, own]
            text |= {name: name for name in vision}
        else:
            left = tuple(_shapes(own))
    else:
        drawn = tuple(vision)

    def tensors() -> NamedTensors:
        for file in files:
            for theirs, tensor in _tensors(file):
                if theirs in text:
                    yield text[theirs], _converted(text[theirs], tensor, config)
                del tensor  # before the next one is read
        for name in drawn:
            yield name, draw_weight(name, wanted[name], config, seed)

    return LoadedWeights(f"hf:{folder}", drawn, left), tensors()


def _converted(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    if not tensor.is_floating_point():
        raise WeightsError(f"{hf_name(name)} is {tensor.dtype}; quantised weights are not read")
    if config.rope_form == "interleaved" and turned_by_rope(name):
        return reorder_pairs(tensor, config.head_dim, to="interleaved")
    return tensor


@torch.no_grad()
def fill_parameters(model: WorldModel, tensors: NamedTensors) -> None:
    """Copy whole tensors into a model's parameters, one after another, into their dtype."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameters[name].copy_(tensor)
        del tensor  # before the next one is read


def _compare(place: Path, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Refuse other names or shapes than the model's, naming them."""
    problems = []
    if missing := [name for name in wanted if name not in found]:
        problems.append(f"missing: {few(missing)}")
    if unexpected := [name for name in found if name not in wanted]:
        problems.append(f"not expected: {few(unexpected)}")
    other = [
        f"{name} is {list(found[name])} and not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if other:
        problems.append(f"of another shape: {few(other)}")
    if problems:
        raise WeightsError(
            f"{place}: {'; '.join(problems)}; the weights are of another model than the config says"
        )


def _require_tied(folder: Path, files: list[WeightFile], head: str, table: str) -> None:
    """Refuse a head of its own where the model takes its table for it."""
    one, other = (tensor for file in files for _, tensor in _tensors(file, {head, table}))
    dtype = torch.promote_types(one.dtype, other.dtype)
    if not torch.equal(one.to(dtype), other.to(dtype)):
        raise WeightsError(
            f"{folder}: {head} is not the embedding table, and the model ties them; set "
            "tie_text_embeddings (tie_word_embeddings in config.json) to false"
        )


def _shapes(file: WeightFile) -> dict[str, Shape]:
    """Names and shapes of a file's tensors; those that the index promises must be there."""
    if file.path.suffix == ".bin":
        shapes = {name: tuple(tensor.shape) for name, tensor in _load_bin(file).items()}
    else:
        with _open(file) as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    if file.names is None:
        return shapes
    if absent := sorted(file.names - shapes.keys()):
        raise WeightsError(f"{file.path}: lacks {few(absent)}, which the index places in it")
    return {name: shape for name, shape in shapes.items() if name in file.names}


def _tensors(file: WeightFile, names: Container[str] | None = None) -> NamedTensors:
    """A file's tensors, or those of these names, one after another, on the CPU."""
    if file.path.suffix == ".bin":
        for name, tensor in _load_bin(file).items():
            if names is None or name in names:
                yield name, tensor
        return
    with _open(file) as opened:
        for name in opened.keys():
            if (file.names is None or name in file.names) and (names is None or name in names):
                yield name, opened.get_tensor(name)


def _open(file: WeightFile) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file.path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file.path}: not a whole safetensors file ({error})") from error


def _load_bin(file: WeightFile) -> dict[str, Tensor]:
    """The tensors of a .bin file; nothing else in it is ever built (weights_only)."""
    try:
        loaded = torch.load(
            file.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file.path)
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{file.path}: not a file of tensors alone ({reason})") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise WeightsError(f"{file.path}: not a mapping of names to tensors")
    return {name: t for name, t in loaded.items() if file.names is None or name in file.names}


def _dtype_of(files: list[WeightFile], name: str) -> torch.dtype:
    for file in files:
        if name in _shapes(file):
            return next(tensor.dtype for found, tensor in _tensors(file) if found == name)
    raise WeightsError(f"{files[0].path.parent}: missing: {name}")
