"""The field syntax of LWM's JSONL: which keys make an example, how they join, what carries loss.

    layout  = field { "," field }          joined as tokens
    field   = part | "[" part "]"          brackets: no loss
    part    = "<|bos|>" | "<|eos|>" | key { "+" key }     plus: joined as text

A key whose name holds "vision" is a list of codes, which stands alone. Keys are taken as they are
written, spaces included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_TOKENS: dict[str, Literal["bos", "eos"]] = {"<|bos|>": "bos", "<|eos|>": "eos"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a layout.

    Attributes:
        keys: of the texts to join, or the one of a list of codes; empty for a token.
        loss: whether it is without brackets.
        position: of its first character in the layout, from 1.
        token: bos or eos, where it stands for one.
    """

    keys: tuple[str, ...]
    loss: bool
    position: int
    token: Literal["bos", "eos"] | None = None


def holds_codes(key: str) -> bool:
    """Whether a key's value is a list of codes: its name says so."""
    return "vision" in key


def parse_layout(layout: str, *, codes: bool) -> tuple[Field, ...]:
    """The fields of a layout.

    Args:
        layout: such as ``[prompt],vision``.
        codes: whether the dataset has a codebook. Without one all keys are texts, as in the text
            datasets of LWM's release.

    Raises:
        ValueError: not a layout; names the field, its number and position, and what to write.
    """
    texts = layout.split(",")
    fields, position = [], 1
    for number, text in enumerate(texts, 1):
        try:
            fields.append(_parse_field(text, position, codes))
        except _FieldError as error:
            better = ",".join([*texts[: number - 1], error.instead, *texts[number:]])
            remedy = f"; write {better!r}" if error.instead else ""
            raise ValueError(
                f"layout {layout!r}, field {number} at character {position}: {error}{remedy}"
            ) from None
        position += len(text) + 1
    return tuple(fields)


class _FieldError(Exception):
    """What is wrong with a field, and what could stand instead."""

    def __init__(self, message: str, instead: str = "") -> None:
        super().__init__(message)
        self.instead = instead


def _parse_field(text: str, position: int, codes: bool) -> Field:
    bracketed = text.startswith("[") and text.endswith("]")
    part = text[1:-1] if bracketed else text
    if not part.strip():
        raise _FieldError("is empty; name a key")
    if "[" in part or "]" in part:
        raise _FieldError(
            "brackets hold exactly one field, as in '[prompt],answer'; give each its own pair"
        )
    if part in _TOKENS:
        return Field((), not bracketed, position, _TOKENS[part])
    keys = tuple(part.split("+"))
    split = ",".join(f"[{key}]" if bracketed else key for key in keys)
    if any(not key.strip() for key in keys):
        raise _FieldError("nothing stands on one side of a plus")
    if len(keys) > 1 and any(key in _TOKENS for key in keys):
        raise _FieldError("a token is joined by comma, not by plus", split)
    if codes and len(keys) > 1 and any(holds_codes(key) for key in keys):
        raise _FieldError("codes are joined by comma, for they are no text", split)
    return Field(keys, not bracketed, position)
