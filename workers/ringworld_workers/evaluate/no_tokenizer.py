"""A model whose tokenizer is not at hand: its loss can be measured all the same."""

from __future__ import annotations

from typing import Any, NoReturn, cast

from ringworld_model.sampling.grammar import Grammar
from ringworld_workers.data.chat_template import ChatTemplate
from ringworld_workers.data.tokenizer import TextTokenizer
from ringworld_workers.generation.coder import Coder, load_coder
from ringworld_workers.generation.source import ModelSource, RequestError


class NoTokenizer:
    """Stands where a tokenizer would be, and says what is missing once it is used."""

    def __init__(self, label: str) -> None:
        """Take the model's name."""
        self._label = label

    def __getattr__(self, name: str) -> NoReturn:
        """Every attribute of a tokenizer is missing.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            f"this evaluation asks {self._label} in words, and its text tokenizer is not at hand; "
            "train from a recipe or from shards that lie beside their tokenizer, or leave out what "
            "asks in words"
        )


def coder_of(source: ModelSource, device: str) -> Coder:
    """The model's tokenizers, or what complains where they are used.

    Raises:
        RequestError, DataError: there is one, and it is not the model's, or cannot be read.
    """
    if source.tokenizer:
        return load_coder(source, device=device)
    missing: Any = NoTokenizer(source.label)
    return Coder(
        source=source,
        tokenizer=cast(TextTokenizer, missing),
        codebook=None,
        grammar=Grammar(),
        template=ChatTemplate(),
    )
