"""What a row begins with: text and clips, as ids and modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringworld_model.batch import VISION
from ringworld_model.tokens import Span


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens of one prompt; at least one.

    Attributes:
        tokens: int64 [n], ids in the space of ``modality``.
        modality: uint8 [n], 0 text, 1 vision.
    """

    tokens: NDArray[np.int64]
    modality: NDArray[np.uint8]

    def __post_init__(self) -> None:
        """Refuse what is no prompt.

        Raises:
            ValueError: no token, or not one modality a token.
        """
        if self.tokens.ndim != 1 or self.tokens.shape != self.modality.shape:
            raise ValueError(
                f"a prompt's tokens have shape {list(self.tokens.shape)}, its modality "
                f"{list(self.modality.shape)}; both must be [n]"
            )
        if len(self.tokens) == 0:
            raise ValueError("a prompt is empty; begin it with the tokenizer's bos at least")

    @classmethod
    def of(cls, *spans: Span) -> Prompt:
        """Join spans of ids, such as text, ``<vision>`` and ``tokens.vision_tokens``."""
        parts = [np.asarray(span.ids, np.int64).reshape(-1) for span in spans]
        kinds = [
            np.full(len(part), span.modality, np.uint8)
            for part, span in zip(parts, spans, strict=True)
        ]
        nothing = [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
        return cls(np.concatenate(parts + nothing[0]), np.concatenate(kinds + nothing[1]))

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def ids(self, modality: int) -> list[int]:
        """The ids of one modality."""
        found: list[int] = self.tokens[(self.modality == VISION) == (modality == VISION)].tolist()
        return found


def padded(prompts: Sequence[Prompt], device: torch.device) -> tuple[Tensor, list[int], Tensor]:
    """Prompts as a session takes them.

    Returns:
        tokens int64 [B, S], lengths, modality uint8 [B, S]; zeros behind a prompt's end.
    """
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
    modality = torch.zeros(tokens.shape, dtype=torch.uint8)
    for at, prompt in enumerate(prompts):
        tokens[at, : lengths[at]] = torch.from_numpy(prompt.tokens)
        modality[at, : lengths[at]] = torch.from_numpy(prompt.modality)
    return tokens.to(device), lengths, modality.to(device)
