"""Which model to generate with, as plain data that travels to workers. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringworld_model.config import ModelConfig
from ringworld_workers.checkpoint.layout import CheckpointRef


class RequestError(ValueError):
    """What is asked of a model cannot be done; the message says why, the limit and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that lies somewhere: a run's checkpoint, or a folder of weights.

    Attributes:
        label: what it is called in messages and records: ``quickstart-1/4k/50``, or the folder.
        config: its shape.
        rope_theta: of the stage that trained it last.
        context_length: tokens of a row that it was trained for.
        checkpoint: of a run; ``url`` is that of its store. None: the weights are in ``folder``.
        folder: of weights in Hugging Face's layout; empty for a checkpoint.
        tokenizer: folder or file of the text tokenizer; empty: none is at hand.
        codebook: folder or file of the frame tokenizer; empty: none is at hand.
        tokenizer_digest: of the tokenizer that trained it; empty: not known.
        codebook_about: what the training data says of its codebook (``size``, ``codes_per_frame``,
            ``digest``, ...); None: not known.
        chat: the words of the chat template that it was trained with, as ``ChatTemplate`` takes
            them; None: it has seen no conversation, or it is not known.
    """

    label: str
    config: ModelConfig
    rope_theta: float
    context_length: int
    checkpoint: CheckpointRef | None = None
    folder: str = ""
    tokenizer: str = ""
    codebook: str = ""
    tokenizer_digest: str = ""
    codebook_about: Mapping[str, Any] | None = None
    chat: Mapping[str, str] | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the vocabularies that trained it, for an exported folder."""
        known = {
            "tokenizer": {"digest": self.tokenizer_digest} if self.tokenizer_digest else None,
            "codebook": dict(self.codebook_about) if self.codebook_about else None,
            "chat": dict(self.chat) if self.chat else None,
        }
        return {name: value for name, value in known.items() if value is not None}
