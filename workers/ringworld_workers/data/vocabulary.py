"""The two tokenizers that a recipe's datasets are written with, as meta.json describes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ringworld_workers.data.tokenizer import TextTokenizer

NUM_END_IDS = 2
"""eof and eov, the vision ids after the codes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the ids of a dataset mean.

    Attributes:
        tokenizer: size and digest of the text tokenizer.
        codebook: what the frame tokenizer says of itself (kind, size, codes_per_frame, frame_size,
            digest); None: the dataset may hold no codes.
    """

    tokenizer: dict[str, Any]
    codebook: dict[str, Any] | None

    @property
    def codebook_size(self) -> int:
        """VQ codes; 0 without a codebook."""
        return 0 if self.codebook is None else int(self.codebook["size"])

    @property
    def num_vision_ids(self) -> int:
        """Codes plus eof and eov; 0 without a codebook."""
        return self.codebook_size + NUM_END_IDS if self.codebook else 0

    def meta(self) -> dict[str, Any]:
        """For meta.json."""
        return {"tokenizer": self.tokenizer, "codebook": self.codebook}


def describe_tokenizer(tokenizer: TextTokenizer) -> dict[str, Any]:
    """Size and digest."""
    return {"size": tokenizer.size, "digest": tokenizer.digest()}
