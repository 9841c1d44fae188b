"""One row while it is written: its settings, its place in the grammar, its text and its draws."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ringworld_model.batch import TEXT, VISION
from ringworld_model.sampling.answer import End, Event
from ringworld_model.sampling.draw import draw, penalised, restrict
from ringworld_model.sampling.grammar import Allowed, Grammar
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_model.sampling.text_stream import Decode, TextStream
from ringworld_model.tokens import VISION_START


class Writer:
    """Decides about one row, alike on every rank; only the rank that draws uses its generator.

    Attributes:
        number: of the prompt.
        row: of the session.
        settings: what the row asks for.
        clip: vision ids of the open clip, the prompt's included; empty outside clips.
        left: tokens that the row may still take.
        end: why it ended; None: it goes on.
        unguided: the session's row without the prompt, while a clip is guided.
    """

    def __init__(
        self,
        number: int,
        prompt: Prompt,
        settings: SamplingSettings,
        grammar: Grammar,
        decode: Decode | None,
        room: int,
    ) -> None:
        """Begin after a prompt.

        Args:
            number: of the prompt.
            prompt: what the row begins with.
            settings: what it asks for.
            grammar: of the model and the request.
            decode: of the tokenizer; None: events carry no text.
            room: tokens that the session has for the row, before the prompt.

        Raises:
            ValueError: the prompt breaks the grammar or leaves no room; or stop texts, and no
                tokenizer that would find them.
        """
        self.number, self.settings = number, settings
        self.row = -1
        self.end: End | None = None
        self.unguided: int | None = None
        self._grammar, self._decode = grammar, decode
        if settings.stop and decode is None:
            raise ValueError(
                f"prompts[{number}]: stop={list(settings.stop)} needs the tokenizer; pass decode"
            )
        left = room - len(prompt)
        if left < 1:
            raise ValueError(
                f"prompts[{number}] has {len(prompt):,} tokens, and the context has room for "
                f"{room:,}, which leaves none for an answer; shorten the prompt, or take a longer "
                "context"
            )
        self.left = left if settings.max_new_tokens is None else min(left, settings.max_new_tokens)
        tokens, modality = prompt.tokens.tolist(), prompt.modality.tolist()
        try:
            self._state = grammar.start(tokens, modality)
            grammar.check_room(self._state, self.left)
        except ValueError as error:
            raise ValueError(f"prompts[{number}]: {error}") from error
        self.clip: list[int] = []
        if self._state.in_clip:
            count = self._state.clip * grammar.frame_tokens + self._state.place
            self.clip = tokens[len(tokens) - count :]
        # Which ids, not how often: a million tokens would be gone through for each one drawn.
        self._prompt = {kind: sorted(set(prompt.ids(kind))) for kind in (TEXT, VISION)}
        self._drawn: dict[int, list[int]] = {TEXT: [], VISION: []}
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._stream: TextStream | None = None
        if decode is not None:
            held = (VISION_START,) if grammar.codebook_size else ()
            before = prompt.ids(TEXT) if not self._state.in_clip else grammar.end_ids
            self._stream = TextStream(decode, before=before, stop=settings.stop, held=held)

    @property
    def allowed(self) -> Allowed:
        """Which token may come next."""
        return self._grammar.allowed(self._state, self.left)

    @property
    def guided(self) -> bool:
        """Whether the next token is drawn with guidance."""
        return self._state.in_clip and self.settings.guidance_scale != 1

    @property
    def beginning(self) -> list[int]:
        """Text ids of ``<vision>``, with which the row without the prompt begins."""
        return list(self._grammar.start_ids)

    def choose(self, allowed: Allowed, logits: Tensor) -> int:
        """Draw the next token.

        Args:
            allowed: what may come.
            logits: [V] of that modality, guided already.
        """
        vision = allowed.modality == VISION
        settings = self.settings.vision if vision else self.settings.text
        if settings.repeats:
            kind = allowed.modality
            logits = penalised(logits, settings, self._prompt[kind], self._drawn[kind])
        return draw(restrict(logits, allowed), settings, self._generator)

    def cancel(self) -> Event:
        """End the row without a token."""
        self.end = "cancelled"
        text = self._stream.finish() if self._stream else ""
        return Event(self.number, None, TEXT, text, end="cancelled")

    def fail(self, problem: str) -> Event:
        """End the row as no token could be drawn; what was held back of its text is left out."""
        self.end = "failed"
        return Event(self.number, None, TEXT, end="failed", problem=problem)

    def take(self, token: int) -> Event:
        """Go on with a token that was allowed, and say what has become of it."""
        before, grammar = self._state, self._grammar
        modality = VISION if before.in_clip else TEXT
        self._state = grammar.advance(before, token)
        self._drawn[modality].append(token)
        self.left -= 1
        frame, text = None, ""
        if before.in_clip:
            self.clip.append(token)
            if before.place == grammar.codes_per_frame:
                codes = self.clip[-grammar.frame_tokens : -1]
                frame = np.array(codes, np.int32)
        elif before.free:
            text = self._text(token)
        if not self._state.in_clip:
            self.clip = []
        done = frame is not None and not self._state.in_clip
        if self.left == 0 and self.end is None:
            self.end = "length"
        if self.end is not None and self._stream is not None:
            text += self._stream.finish()
        return Event(self.number, token, modality, text, frame, done, self.end)

    def _text(self, token: int) -> str:
        """Text after one more id of free text; ends the row where it stops."""
        if token in self.settings.stop_ids:
            self.end = "stop"
            return ""
        if self._stream is None:
            return ""
        text = self._stream.push(token)
        if self._stream.stopped is not None:
            self.end = "stop"
        elif self._state.in_clip:
            text += self._stream.cut(VISION_START, self._grammar.end_ids)
        return text
