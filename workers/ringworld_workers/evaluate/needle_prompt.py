"""Prompts with needles, of an exact length: head, haystack with needles, question.

The strings are those that ``ChatTemplate`` gives a training document, so that a model is asked in
the words that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringworld_jobs.needle_format import NeedleFormat
from ringworld_workers.data.chat_template import ChatTemplate
from ringworld_workers.data.tokenizer import TextTokenizer
from ringworld_workers.evaluate.haystack import Haystack, encode_within


@dataclass(frozen=True, slots=True)
class Needle:
    """What is hidden where.

    Attributes:
        city: whose number it tells.
        number: digits.
        depth: where it should go: percent of the haystack's tokens.
    """

    city: str
    number: str
    depth: float


@dataclass(frozen=True, slots=True, eq=False)
class NeedlePrompt:
    """A prompt.

    Attributes:
        tokens: int64 [n].
        depths: percent of the haystack's tokens before each needle, at a sentence's end.
    """

    tokens: npt.NDArray[np.int64]
    depths: tuple[float, ...]


def template_of(format_: NeedleFormat, known: ChatTemplate) -> ChatTemplate:
    """The words of a conversation: the format's, and those known for what it leaves open."""
    return ChatTemplate(
        known.system if format_.system is None else format_.system,
        known.user_prefix if format_.user_prefix is None else format_.user_prefix,
        known.assistant_prefix if format_.assistant_prefix is None else format_.assistant_prefix,
    )


class Wording:
    """A needle test's words in a model's tokens."""

    def __init__(
        self,
        format_: NeedleFormat,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None = None,
    ) -> None:
        """Encode what every prompt begins with.

        Args:
            format_: the words.
            tokenizer: the model's.
            template: of the conversations that the model was trained on, for what ``format_``
                leaves open; None: LWM's.
        """
        self.format, self.tokenizer = format_, tokenizer
        self.template = template_of(format_, template or ChatTemplate())
        opening = ""
        if format_.template == "chat":
            opening = " ".join(filter(None, (self.template.system, self.template.user_prefix)))
        self.head = [tokenizer.bos_id, *(tokenizer.encode(opening) if opening else [])]

    def tail(self, question: str) -> list[int]:
        """Ids of a question after a document, up to where the answer begins."""
        text = f" {question}"
        if self.format.template == "chat":
            text += f" {self.template.assistant_prefix}"
        return self.within(text)

    def within(self, text: str) -> list[int]:
        """Ids of a text within a longer one."""
        return encode_within(self.tokenizer, [text])[0]

    def hide(
        self,
        haystack: Haystack,
        needles: Sequence[Needle],
        tokens: int,
        *,
        place: Callable[[Haystack, float], int] = Haystack.place,
    ) -> Hidden:
        """Needles in as much of a haystack as makes so many tokens together.

        Args:
            haystack: at least as long.
            needles: at least one.
            tokens: of haystack and needles.
            place: where a depth is.

        Raises:
            ValueError: the needles alone have more.
        """
        ordered = sorted(needles, key=lambda needle: needle.depth)
        texts = [self.format.needle_of(needle.city, needle.number) for needle in ordered]
        encoded = encode_within(self.tokenizer, texts)
        cut = haystack.cut(self._left(tokens, encoded))
        places = [place(cut, needle.depth) for needle in ordered]
        if places[0] == 0:
            # What a chat says begins with a space, not with a line's end.
            texts[0] = " " + texts[0].lstrip()
            encoded[0] = self.within(texts[0])
            before = len(cut.tokens)
            cut = haystack.cut(self._left(tokens, encoded))
            places = [
                len(cut.tokens) if at == before else min(at, len(cut.tokens)) for at in places
            ]
        return Hidden(cut, tuple(ordered), tuple(texts), tuple(map(tuple, encoded)), tuple(places))

    def room(self, needles: Sequence[Needle], tokens: int) -> int:
        """How many of so many tokens needles leave to a haystack.

        Raises:
            ValueError: they have more themselves.
        """
        texts = [self.format.needle_of(needle.city, needle.number) for needle in needles]
        return self._left(tokens, encode_within(self.tokenizer, texts))

    def prompt(
        self, haystack: Haystack, needles: Sequence[Needle], question: str, tokens: int
    ) -> NeedlePrompt:
        """A prompt of exactly so many tokens.

        Raises:
            ValueError: the words alone have more.
        """
        tail = self.tail(question)
        hidden = self.hide(haystack, needles, tokens - len(self.head) - len(tail))
        found = np.concatenate([self.head, hidden.tokens(), tail]).astype(np.int64)
        return NeedlePrompt(found, hidden.depths())

    @staticmethod
    def _left(tokens: int, encoded: Iterable[Sequence[int]]) -> int:
        needed = sum(map(len, encoded))
        if needed > tokens:
            raise ValueError(
                f"the needles take {needed:,} tokens, and beside question and answer "
                f"{max(0, tokens):,} are left for them; raise the length, or hide or ask less"
            )
        return tokens - needed


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """A haystack with needles in it.

    Attributes:
        haystack: without them.
        needles: by depth.
        texts: what each needle says.
        encoded: the same in tokens.
        places: tokens of the haystack before each.
    """

    haystack: Haystack
    needles: tuple[Needle, ...]
    texts: tuple[str, ...]
    encoded: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]

    def tokens(self) -> npt.NDArray[np.int64]:
        """All of it, int64 [n]."""
        return np.insert(
            self.haystack.tokens,
            np.repeat(self.places, [len(ids) for ids in self.encoded]),
            np.concatenate([np.asarray(ids, np.int64) for ids in self.encoded]),
        )

    def depths(self) -> tuple[float, ...]:
        """Percent of the haystack before each needle."""
        whole = max(1, len(self.haystack.tokens))
        return tuple(round(100 * place / whole, 2) for place in self.places)

    def text(self, last: str) -> str:
        """All of it as text.

        Args:
            last: instead of the haystack's last sentence, which may be cut.
        """
        sentences = [*self.haystack.texts[:-1], last]
        ends = self.haystack.ends.tolist()
        said: list[str] = []
        for number, place in enumerate(ends):
            said += [text for text, at in zip(self.texts, self.places, strict=True) if at == place]
            said += sentences[number : number + 1]
        return "".join(said)
