"""Conversations as LWM writes them, for training: what the model says carries loss, no more.

    You are a helpful assistant. USER: {question} ASSISTANT: {answer}<eos>USER: {question} ...

A clip stands after the question's text and a newline, as in LWM's own prompts:
``USER: {question}\\n<vision>...</vision> ASSISTANT:``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ringworld_jobs.chat_words import ASSISTANT_PREFIX, CHAT_SYSTEM, USER_PREFIX
from ringworld_model.tokens import VISION_END, VISION_START
from ringworld_workers.data.draft import Part, SpecialPart, TextPart, VisionPart

Role = Literal["system", "user", "assistant"]
Content = str | npt.NDArray[np.int32]
"""Text, or a clip's codes int32 [F, C]."""
IMAGE_PROMPT = "Generate an image of {}"
"""What LWM asks for an image."""
VIDEO_PROMPT = "Generate a video of {}"
"""What LWM asks for a video."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says: texts and clips in order."""

    role: Role
    content: tuple[Content, ...]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a conversation is spelled; the defaults are LWM's.

    Attributes:
        system: the line before a conversation without one of its own; empty: none.
        user_prefix: before a question.
        assistant_prefix: before an answer.
    """

    system: str = CHAT_SYSTEM
    user_prefix: str = USER_PREFIX
    assistant_prefix: str = ASSISTANT_PREFIX

    def parts(self, turns: Sequence[Turn]) -> tuple[Part, ...]:
        """The parts of a conversation, from bos to the last answer's eos.

        Loss is on each answer and its eos. The space before an answer is a token boundary: the
        prompt ends in ``ASSISTANT:``, as it does where the model is asked.

        Args:
            turns: an optional system turn of text, then user and assistant in turn, at least one
                of each, the last an assistant; no text is blank.

        Raises:
            ValueError: turns out of this order, or blank; names the turn, counted from 1.
        """
        self._check(turns)
        if not any(turn.role == "assistant" for turn in turns):
            raise ValueError("no message of role 'assistant', so nothing to learn")
        if turns[-1].role != "assistant":
            raise ValueError(f"message {len(turns)}, the last, is a question without an answer")
        return self._spelled(turns)

    def prompt(self, turns: Sequence[Turn]) -> tuple[Part, ...]:
        """The parts of a conversation up to the next answer: it ends in ``assistant_prefix``.

        Args:
            turns: as for ``parts``, but the last is the user's.

        Raises:
            ValueError: as ``parts``.
        """
        self._check(turns)
        if not turns or turns[-1].role != "user":
            raise ValueError("the last message is not of role 'user', so nothing is asked")
        return self._spelled(turns)

    def question(self, content: Sequence[Content], *, first: bool) -> tuple[Part, ...]:
        """The parts of a question, up to its answer, for who spells a conversation turn by turn.

        Args:
            content: texts and clips in order.
            first: it opens the conversation, so that the system line precedes it; bos does not.
        """
        lead = f"{self.system} {self.user_prefix}" if first and self.system else self.user_prefix
        return tuple(self._question(lead, content))

    def continued(self, content: Sequence[Content], *, after_clip: bool) -> tuple[Part, ...]:
        """The rest of a question whose beginning, such as a document, has been spelled already.

        Args:
            content: texts and clips in order.
            after_clip: the beginning ends in a clip; else in text.
        """
        found = tuple(self._question("", content))
        if after_clip or not isinstance(found[0], TextPart):
            return found
        return (replace(found[0], text=found[0].text.lstrip(" "), after_space=True), *found[1:])

    def _spelled(self, turns: Sequence[Turn]) -> tuple[Part, ...]:
        system = self.system
        parts: list[Part] = [SpecialPart("bos", loss=False)]
        lead = ""
        for turn in turns:
            if turn.role == "system":
                system = " ".join(str(text) for text in turn.content)
            elif turn.role == "user":
                # The system line opens the conversation, once.
                first = len(parts) == 1 and system
                lead = f"{system} {self.user_prefix}" if first else self.user_prefix
                parts += self._question(lead, turn.content)
            else:
                parts += _answer(turn.content)
        return tuple(parts)

    def _question(self, lead: str, content: Sequence[Content]) -> Iterator[Part]:
        """Texts are run together; each stretch between clips is tokenized as one."""
        text = lead
        for number, piece in enumerate(content):
            if isinstance(piece, str):
                text += f" {piece}"
                continue
            if number and text:
                text += "\n"
            if text:
                yield TextPart(text, loss=False)
            yield from clip_parts(piece, loss=False)
            text = ""
        yield TextPart(f"{text} {self.assistant_prefix}", loss=False)

    def _check(self, turns: Sequence[Turn]) -> None:
        body = turns[1:] if turns and turns[0].role == "system" else turns
        skipped = len(turns) - len(body)
        for number, turn in enumerate(turns, 1):
            if not turn.content or any(_blank(piece) for piece in turn.content):
                raise ValueError(f"message {number} ({turn.role}) is empty")
            if turn.role == "system" and not all(isinstance(piece, str) for piece in turn.content):
                raise ValueError(f"message {number} (system) holds media; a system line is text")
        for number, turn in enumerate(body):
            expected = ("user", "assistant")[number % 2]
            if turn.role != expected:
                raise ValueError(
                    f"message {number + skipped + 1} is of role {turn.role!r}, expected "
                    f"{expected!r}; user and assistant take turns after at most one system message"
                )


def clip_parts(codes: npt.NDArray[np.int32], *, loss: bool) -> tuple[Part, ...]:
    """A clip between its delimiters, which share its loss.

    Args:
        codes: int32 [F, C].
        loss: whether the model learns to predict them.
    """
    return TextPart(VISION_START, loss), VisionPart(codes, loss), TextPart(VISION_END, loss)


def _answer(content: Sequence[Content]) -> Iterator[Part]:
    for piece in content:
        if isinstance(piece, str):
            yield TextPart(piece, after_space=True)
        else:
            yield from clip_parts(piece, loss=True)
    yield SpecialPart("eos")


def _blank(piece: Content) -> bool:
    return not piece.strip() if isinstance(piece, str) else len(piece) == 0
