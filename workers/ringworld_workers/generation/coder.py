"""Text and pictures to a model's tokens and back: all that is needed of a model but its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringworld_model.sampling.grammar import Grammar
from ringworld_model.tokens import VISION_END, VISION_START
from ringworld_model.vision.frame_tokenizer import FrameTokenizer, load_frame_tokenizer
from ringworld_workers.data.chat_template import ChatTemplate
from ringworld_workers.data.tokenizer import TextTokenizer, load_tokenizer
from ringworld_workers.generation.source import ModelSource, RequestError

LWM_CODES_PER_FRAME = 256


@dataclass(kw_only=True)
class Coder:
    """What turns questions into a model's tokens, and its tokens into answers.

    Attributes:
        source: of the model.
        tokenizer: of text.
        codebook: of frames; None: the model has no vision, or its codebook is not at hand.
        grammar: of what the model may write; without a codebook it opens no clip.
        template: how a conversation is spelled.
    """

    source: ModelSource
    tokenizer: TextTokenizer
    codebook: FrameTokenizer | None
    grammar: Grammar
    template: ChatTemplate

    @property
    def label(self) -> str:
        """What the model is called."""
        return self.source.label

    @property
    def context_length(self) -> int:
        """Tokens of a row that the model was trained for."""
        return self.source.context_length

    @property
    def codes_per_frame(self) -> int:
        """Codes of one frame."""
        return self.grammar.codes_per_frame

    @property
    def start_ids(self) -> tuple[int, ...]:
        """Text ids of ``<vision>``."""
        return self.grammar.start_ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Text ids of ``</vision>``."""
        return self.grammar.end_ids

    def need_codebook(self, what: str) -> FrameTokenizer:
        """The codebook.

        Args:
            what: that it is needed for, as a sentence begins.

        Raises:
            RequestError: there is none; says why, and the remedy.
        """
        if self.codebook is not None:
            return self.codebook
        if not self.source.config.vision_codebook_size:
            raise RequestError(
                f"{what} needs a model with vision, and {self.label} has only text; take one that "
                "was trained with a codebook"
            )
        raise RequestError(
            f"{what} needs the codebook that {self.label} was trained with, which is not at hand; "
            "name it with --codebook (its file or folder, or the folder of prepared data)"
        )

    def pictures(self, codes: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """What codes show.

        Args:
            codes: int32 [F, C].

        Returns:
            uint8 [F, N, N, 3].

        Raises:
            RequestError: the codebook is not at hand.
        """
        return self.need_codebook("a picture").decode(codes)


def load_coder(source: ModelSource, *, device: str = "cpu") -> Coder:
    """Load a model's tokenizers; its weights are not touched.

    Args:
        source: of ``find_model``.
        device: where a VQGAN computes.

    Raises:
        RequestError: there is no tokenizer, or one or the codebook is not the model's.
        DataError: the tokenizer cannot be read.
    """
    if not source.tokenizer:
        raise RequestError(
            f"the text tokenizer of {source.label} is not at hand; name it with --tokenizer "
            "(tokenizer.json, a SentencePiece .model, or a folder that holds one)"
        )
    tokenizer = load_tokenizer(Path(source.tokenizer))
    _check_tokenizer(source, tokenizer)
    codebook = _codebook(source, device)
    size = source.config.vision_codebook_size
    about = source.codebook_about or {}
    codes = about.get("codes_per_frame", LWM_CODES_PER_FRAME)
    grammar = Grammar(
        codebook_size=size,
        codes_per_frame=codebook.codes_per_frame if codebook else int(codes),
        start_ids=tuple(tokenizer.encode(VISION_START)),
        end_ids=tuple(tokenizer.encode(VISION_END)),
        max_frames=None if codebook or about or not size else 0,
    )
    return Coder(
        source=source,
        tokenizer=tokenizer,
        codebook=codebook,
        grammar=grammar,
        template=ChatTemplate(**source.chat) if source.chat is not None else ChatTemplate(),
    )


def _check_tokenizer(source: ModelSource, tokenizer: TextTokenizer) -> None:
    wanted = source.tokenizer_digest
    if wanted and tokenizer.digest() != wanted:
        raise RequestError(
            f"{source.tokenizer} is not the tokenizer that {source.label} was trained with (digest "
            f"{tokenizer.digest()[:12]}, expected {wanted[:12]}); name that one with --tokenizer"
        )
    rows = source.config.text_vocab_size
    if tokenizer.size > rows:
        raise RequestError(
            f"{source.tokenizer} has {tokenizer.size:,} ids and the text table of {source.label} "
            f"{rows:,} rows; name the model's own tokenizer with --tokenizer"
        )


def _codebook(source: ModelSource, device: str) -> FrameTokenizer | None:
    size = source.config.vision_codebook_size
    if not source.codebook or not size:
        return None
    try:
        codebook = load_frame_tokenizer(source.codebook, device)
    except (ValueError, OSError) as error:
        raise RequestError(f"the codebook cannot be read: {error}") from error
    if codebook.codebook_size != size:
        raise RequestError(
            f"{source.codebook} has {codebook.codebook_size:,} codes and {source.label} was built "
            f"for {size:,}; name the codebook that it was trained with (--codebook)"
        )
    digest = (source.codebook_about or {}).get("digest", "")
    # Precomputed codes may name their codebook instead of giving its digest.
    if len(digest) == 64 and codebook.digest() != digest:
        raise RequestError(
            f"{source.codebook} is not the codebook that {source.label} was trained with (digest "
            f"{codebook.digest()[:12]}, expected {digest[:12]}); name that one with --codebook"
        )
    return codebook
