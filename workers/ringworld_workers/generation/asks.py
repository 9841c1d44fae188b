"""What may be asked of a model: text, an image or a video, as a prompt and rules for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ringworld_model.batch import TEXT, VISION
from ringworld_model.sampling.grammar import Grammar
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_model.tokens import Span
from ringworld_workers.data.chat_template import IMAGE_PROMPT, VIDEO_PROMPT
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.prompts import (
    Medium,
    Part,
    chat_prompt,
    codes_of,
    prompt_of,
)
from ringworld_workers.generation.source import RequestError

Form = Literal["auto", "chat", "plain"]
"""How a question is spelled: in the chat template, as it stands, or by what trained the model."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One thing to ask.

    Attributes:
        prompt: what the row begins with.
        settings: how the answer is drawn.
        grammar: what it may be.
        given: int32 [F, C], frames of a clip that the answer goes on with; None: there are none.
    """

    prompt: Prompt
    settings: SamplingSettings
    grammar: Grammar
    given: npt.NDArray[np.int32] | None = None


def is_chat(form: Form, coder: Coder) -> bool:
    """Whether a question is put into the chat template.

    Args:
        form: ``auto``: if the model was trained on conversations, as far as is known.
        coder: of the model.
    """
    return coder.source.chat is not None if form == "auto" else form == "chat"


def text_ask(
    parts: Sequence[Part],
    coder: Coder,
    settings: SamplingSettings,
    *,
    form: Form = "auto",
    max_frames: int | None = None,
) -> Ask:
    """A question that is answered in text, and in clips where the model opens one.

    Args:
        parts: texts and media in order.
        coder: of the model.
        settings: eos is added to its stop ids.
        form: see ``is_chat``.
        max_frames: that the answer may draw; 0: it is text alone.

    Raises:
        RequestError: a medium cannot be used, or the question does not fit the context.
    """
    if is_chat(form, coder):
        prompt = chat_prompt([{"role": "user", "content": tuple(parts)}], coder)
    else:
        prompt = prompt_of(parts, coder)
    check_length(len(prompt), 1, coder)
    grammar = coder.grammar
    if max_frames is not None and grammar.max_frames is None:
        grammar = replace(grammar, max_frames=max_frames)
    stops = (*settings.stop_ids, coder.tokenizer.eos_id)
    return Ask(prompt=prompt, settings=replace(settings, stop_ids=stops), grammar=grammar)


def clip_ask(
    caption: str,
    frames: int,
    coder: Coder,
    settings: SamplingSettings,
    *,
    video: bool,
    form: Form = "auto",
    given: Medium | None = None,
) -> Ask:
    """A caption that is answered with an image or a video.

    Args:
        caption: what shall be seen.
        frames: to be drawn.
        coder: of the model.
        settings: ``max_new_tokens`` is set to what the frames take.
        video: whether a video is asked for; an image has one frame.
        form: see ``is_chat``.
        given: an image or video that the clip begins with.

    Raises:
        RequestError: the model draws nothing, a medium cannot be used, or the frames do not fit
            the context.
    """
    coder.need_codebook("a video" if video else "an image")
    if frames < 1:
        raise RequestError(f"{frames} frames are asked for; ask for 1 at least")
    codes = None if given is None else codes_of(given, coder)
    grammar = coder.grammar
    tokens = frames * grammar.frame_tokens + len(grammar.end_ids)
    if is_chat(form, coder):
        wanted = (VIDEO_PROMPT if video else IMAGE_PROMPT).format(caption)
        question = chat_prompt([{"role": "user", "content": wanted}], coder)
    else:
        question = prompt_of([caption], coder)
    spans = [
        Span(question.tokens, TEXT),
        Span(grammar.start_ids, TEXT),
        Span(_unfinished(codes, grammar), VISION),
    ]
    prompt = Prompt.of(*spans)
    check_length(len(prompt), tokens, coder, frames)
    total = frames + (0 if codes is None else len(codes))
    return Ask(
        prompt=prompt,
        settings=replace(settings, max_new_tokens=tokens),
        grammar=replace(grammar, clip_frames=total, max_frames=frames),
        given=codes,
    )


def check_length(prompt: int, answer: int, coder: Coder, frames: int = 0) -> None:
    """Refuse what the model's context has no room for.

    Args:
        prompt: its tokens.
        answer: tokens that it needs at least.
        coder: of the model.
        frames: that the answer is made of; 0: it is text.

    Raises:
        RequestError: says the lengths and the remedy.
    """
    context = coder.context_length
    if prompt + answer <= context:
        return
    if frames:
        each = coder.grammar.frame_tokens
        most = max(0, (context - prompt - len(coder.end_ids)) // each)
        raise RequestError(
            f"{frames:,} frames of {each} tokens take {answer:,}, the prompt {prompt:,}, and "
            f"{coder.label} was trained for {context:,}; ask for {most:,} frames at most"
            if most
            else f"a frame takes {each} tokens, the prompt {prompt:,}, and {coder.label} was "
            f"trained for {context:,}, which leaves room for none; take a model of a longer context"
        )
    raise RequestError(
        f"the prompt has {prompt:,} tokens, and {coder.label} was trained for {context:,}, answer "
        "included; shorten the prompt, take fewer frames, or a model of a longer context"
    )


def _unfinished(codes: npt.NDArray[np.int32] | None, grammar: Grammar) -> npt.NDArray[np.int32]:
    """Vision ids of frames that others follow: each ends in eof."""
    if codes is None:
        return np.zeros(0, np.int32)
    ends = np.full((len(codes), 1), grammar.eof_id, np.int32)
    return np.concatenate([codes, ends], axis=1).reshape(-1)
