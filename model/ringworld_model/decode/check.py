"""Refuses tokens that a session cannot take, before anything is computed or sent."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ringworld_model.batch import NUM_MODALITIES, VISION
from ringworld_model.config import ModelConfig


def check_tokens(
    name: str, tokens: Tensor, modality: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Refuse tensors of another kind.

    Args:
        name: of the tokens, for messages.
        tokens: should be int64 of ``shape`` on ``device``.
        modality: should be integers of ``shape`` on ``device``; None: all text.
        shape: what they should have; -1 stands for any length above 0.
        device: the model's.

    Returns:
        The modality.

    Raises:
        ValueError: what is wrong, and the remedy.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name} are {kind}; give token ids as an int64 tensor")
    if tokens.dim() != len(shape) or any(
        want not in (-1, got) for want, got in zip(shape, tokens.shape, strict=True)
    ):
        wanted = ", ".join("S" if size < 0 else str(size) for size in shape)
        raise ValueError(f"{name} have shape {list(tokens.shape)}; they must be [{wanted}]")
    if tokens.numel() == 0:
        raise ValueError(f"{name} have shape {list(tokens.shape)}: an empty prompt; give a token")
    if modality is None:
        modality = torch.zeros_like(tokens)
    if not isinstance(modality, Tensor) or modality.is_floating_point():
        raise ValueError("modality must be a tensor of whole numbers, 0 text and 1 vision")
    if modality.shape != tokens.shape:
        raise ValueError(
            f"modality has shape {list(modality.shape)}, the {name} {list(tokens.shape)}; give one "
            "a token"
        )
    if tokens.device != device or modality.device != device:
        raise ValueError(
            f"{name} are on {tokens.device}, modality on {modality.device}, the model on {device}; "
            "move them to the model's device"
        )
    return modality


def check_ids(name: str, tokens: Tensor, modality: Tensor, config: ModelConfig) -> None:
    """Refuse ids that the model has no embedding for.

    Args:
        name: of the tokens, for messages.
        tokens: int64 [n], without padding.
        modality: integers [n].
        config: the model's shape.

    Raises:
        ValueError: names the id, its modality, the limit and the remedy.
    """
    if bool(((modality < 0) | (modality >= NUM_MODALITIES)).any()):
        raise ValueError("modality holds other numbers than 0 (text) and 1 (vision)")
    vision = modality == VISION
    for kind, here, size in (
        ("text", tokens[~vision], config.text_vocab_size),
        ("vision", tokens[vision], config.vision_vocab_size),
    ):
        if here.numel() == 0:
            continue
        if size == 0:
            raise ValueError(
                f"{name} hold {here.numel()} vision tokens, the model has no vision table; take a "
                "model that was trained with a codebook"
            )
        low, high = (int(value) for value in here.aminmax())
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} hold {kind} id {wrong}, outside the model's {size:,} {kind} ids; encode "
                "them with the tokenizer that the model was trained with"
            )


def check_lengths(lengths: Sequence[int] | None, rows: int, longest: int) -> list[int]:
    """Prompt lengths as whole numbers, all of ``longest`` where None.

    Raises:
        ValueError: not one a row, below 1 or above the tensor's width.
    """
    if lengths is None:
        return [longest] * rows
    found = [int(length) for length in lengths]
    if len(found) != rows:
        raise ValueError(f"{len(found)} lengths for {rows} prompts; give one a prompt")
    for at, length in enumerate(found):
        if length < 1:
            raise ValueError(f"lengths[{at}]={length}: an empty prompt; give it a token at least")
        if length > longest:
            raise ValueError(f"lengths[{at}]={length}, but the prompts are {longest} tokens wide")
    return found


def check_room(row: int, have: int, more: int, max_length: int) -> None:
    """Refuse tokens beyond the context.

    Raises:
        ValueError: names the row, the tokens, the limit and the remedy.
    """
    if have + more > max_length:
        raise ValueError(
            f"row {row}: {more:,} tokens after {have:,} are {have + more:,}, more than "
            f"max_length={max_length:,}; shorten the prompt, rewind, or take a session (and a "
            "model) of a longer context"
        )


def describe(what: str, rows: Sequence[int], tokens: Tensor, modality: Tensor) -> str:
    """What must be the same on every rank, in a line."""
    digest = 0
    for tensor in (tokens, modality.to(torch.uint8)):
        digest = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), digest)
    return f"{what} of {tokens.numel()} tokens ({digest:08x}) for rows {list(rows)}"
