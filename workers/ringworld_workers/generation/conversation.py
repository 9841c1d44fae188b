"""A conversation whose past stays in the cache: a document is read once, then asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ringworld_model.batch import TEXT, VISION
from ringworld_model.decode import Mark
from ringworld_model.generate import Cancelled
from ringworld_model.sampling.answer import Event
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.sampling.settings import SamplingSettings
from ringworld_model.tokens import Span
from ringworld_workers.data.chat_template import clip_parts
from ringworld_workers.data.draft import Part as DraftPart
from ringworld_workers.data.draft import SpecialPart, TextPart
from ringworld_workers.generation.asker import OnChunk
from ringworld_workers.generation.asks import Ask
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.local_ring import LocalRing
from ringworld_workers.generation.prompts import Medium, Part, codes_of, spans_of, utf8
from ringworld_workers.generation.source import RequestError


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a conversation is: what to go back to.

    Attributes:
        mark: of the session.
        length: tokens of the row.
        asked: a question was asked; else there is at most what it is about.
        unsaid: ids that end the last answer and are not in the row yet.
    """

    mark: Mark
    length: int
    asked: bool = False
    unsaid: tuple[int, ...] = ()


def opening_prompt(parts: Sequence[Part], coder: Coder) -> Prompt:
    """What a conversation about something begins with: all of a first question but the question.

    Args:
        parts: a document's text, images, videos.
        coder: of the model.

    Raises:
        RequestError: a medium cannot be used, or it leaves no room for a question.
    """
    template = coder.template
    text = f"{template.system} {template.user_prefix}".strip()
    drafts: list[DraftPart] = [SpecialPart("bos")]
    for number, part in enumerate(parts):
        if isinstance(part, str):
            text += f" {part}"
            continue
        # As the template has it: a clip behind the question's text begins a line.
        if number and text:
            text += "\n"
        drafts += [TextPart(text), *_clip(part, coder)]
        text = ""
    prompt = Prompt.of(*spans_of([*drafts, TextPart(text)] if text else drafts, coder))
    if len(prompt) >= coder.context_length:
        raise RequestError(
            f"what the conversation is about has {len(prompt):,} tokens, and {coder.label} was "
            f"trained for {coder.context_length:,}, questions and answers included; shorten it, "
            "take fewer frames, or a model of a longer context"
        )
    return prompt


def _clip(medium: Medium, coder: Coder) -> tuple[DraftPart, ...]:
    return clip_parts(codes_of(medium, coder), loss=False)


class Conversation:
    """Turns of one row of a ring.

    Attributes:
        row: of the ring's sessions.
    """

    def __init__(
        self, ring: LocalRing, settings: SamplingSettings, max_frames: int | None = None
    ) -> None:
        """Begin an empty one.

        Args:
            ring: entered.
            settings: of every answer; eos is added to its stop ids.
            max_frames: that an answer may draw; None: as many as the model likes.
        """
        self._ring, self._coder = ring, ring.asker.loaded
        eos = self._coder.tokenizer.eos_id
        self._settings = replace(settings, stop_ids=(*settings.stop_ids, eos))
        grammar = self._coder.grammar
        # A model whose codebook is not at hand draws nothing.
        most = grammar.max_frames if grammar.max_frames is not None else max_frames
        self._grammar = replace(grammar, max_frames=most)
        self.row: int = ring.call("open")
        self._now = _Place(ring.call("mark"), 0)
        self._turns: list[_Place] = []
        self._about: Prompt | None = None

    @property
    def length(self) -> int:
        """Tokens that the row holds."""
        return self._now.length

    @property
    def left(self) -> int:
        """Tokens that are left for questions and answers."""
        return self._coder.context_length - self.length

    def read(self, opening: Prompt, *, on_chunk: OnChunk | None = None) -> None:
        """Read what the conversation is about, once, before the first question.

        Args:
            opening: of ``opening_prompt``.
            on_chunk: told the tokens read, and in all.
        """
        self._ring.call("read", self.row, opening, on_chunk=on_chunk)
        self._about = opening
        self._now = _Place(self._ring.call("mark"), len(opening))

    def ask(
        self,
        parts: Sequence[Part],
        *,
        cancelled: Cancelled | None = None,
        on_chunk: OnChunk | None = None,
    ) -> Iterator[Event]:
        """Ask the next question; its answer stays in the conversation.

        An answer that is cancelled within a clip is taken back with its question.

        Args:
            parts: texts and media in order.
            cancelled: see ``generate``.
            on_chunk: told the tokens of the question read, and in all.

        Raises:
            RequestError: a medium cannot be used, or there is no room left.
        """
        prompt = self._question(parts)
        if len(prompt) >= self.left:
            raise RequestError(
                f"the question has {len(prompt):,} tokens, and {self.left:,} of the "
                f"{self._coder.context_length:,} are left; take turns back (/undo, /reset)"
            )
        before = self._now
        ask = Ask(prompt=prompt, settings=self._settings, grammar=self._grammar)
        answer = self._ring.call("answer", [ask], self.row, cancelled=cancelled, on_chunk=on_chunk)
        length, last, in_clip = before.length + len(prompt), None, False
        for event in answer:
            # The token that ends an answer is not put into the row.
            length += event.end is None
            last = event.token
            if last is not None:
                in_clip = event.modality == VISION and not event.clip_done
            yield event
        if in_clip:
            self._ring.call("rewind", before.mark)
            return
        eos = self._coder.tokenizer.eos_id
        unsaid = (eos,) if last in (None, eos) else (last, eos)
        self._turns.append(before)
        self._now = _Place(self._ring.call("mark"), length, asked=True, unsaid=unsaid)

    def undo(self) -> bool:
        """Take the last question and its answer back; False: there is none."""
        if not self._turns:
            return False
        self._go_back(self._turns.pop())
        return True

    def reset(self) -> None:
        """Take everything back but what the conversation is about."""
        if self._turns:
            self._go_back(self._turns[0])
            self._turns = []

    def _go_back(self, place: _Place) -> None:
        self._ring.call("rewind", place.mark)
        self._now = place

    def _question(self, parts: Sequence[Part]) -> Prompt:
        """What is put behind the row: the end of the answer before, and the question."""
        template, now = self._coder.template, self._now
        content = tuple(
            utf8(part) if isinstance(part, str) else codes_of(part, self._coder) for part in parts
        )
        ids = list(now.unsaid)
        if not now.asked and self._about is not None:
            drafts = template.continued(content, after_clip=self._ends_in_clip(self._about))
        else:
            drafts = template.question(content, first=not now.asked)
            ids = ids or [self._coder.tokenizer.bos_id]
        return Prompt.of(Span(ids, TEXT), *spans_of(drafts, self._coder))

    def _ends_in_clip(self, prompt: Prompt) -> bool:
        before_end = len(prompt) - len(self._coder.end_ids) - 1
        return before_end >= 0 and int(prompt.modality[before_end]) == VISION
