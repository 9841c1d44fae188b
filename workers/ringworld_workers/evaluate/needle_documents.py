"""Training documents in the format of the needle test: what a small model learns retrieval from.

Their cities and numbers are other than the evaluation's (see ``cities``). In the chat format a
document is a conversation, of which the answers alone carry loss (recipe kind ``chat``); in the
plain one, a line in LWM's form (kind ``lwm`` with ``fields_from_example: fields``).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringworld_jobs.needle_format import NeedleDocumentsSpec
from ringworld_workers.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from ringworld_workers.evaluate.cities import draw_cities, draw_numbers
from ringworld_workers.evaluate.haystack import Haystack, Haystacks
from ringworld_workers.evaluate.needle_prompt import Hidden, Needle, Wording

BYTES = "bytes"
"""Names the tokenizer whose pieces are the 256 bytes."""
_BYTE_PIECES = 258
_END = 1
"""The eos after an answer."""
_CHECKED = 64
"""Documents whose needles are counted before a build."""


@dataclass(frozen=True, slots=True)
class NeedleDocument:
    """A document and questions about it.

    Attributes:
        context: the text with its needles; it begins without white space.
        turns: questions, with their instructions, and answers.
        tokens: of the example that it becomes, bos and eos included, at most.
    """

    context: str
    turns: tuple[tuple[str, str], ...]
    tokens: int

    def messages(self) -> dict[str, Any]:
        """A record of the recipe kind ``chat``."""
        said: list[dict[str, str]] = []
        for number, (question, answer) in enumerate(self.turns):
            asked = question if number else f"{self.context} {question}"
            said.append({"role": "user", "content": asked})
            said.append({"role": "assistant", "content": answer})
        return {"messages": said}

    def fields(self, marks_words: bool) -> dict[str, Any]:
        """A record of the recipe kind ``lwm``.

        Args:
            marks_words: the tokenizer's; others need the space before an answer spelled.
        """
        space = "" if marks_words else " "
        record: dict[str, Any] = {}
        layout = []
        for number, (question, answer) in enumerate(self.turns):
            asked = question if number else f"{space}{self.context} {question}"
            record[f"question{number}"] = asked if number == 0 else f"{space}{question}"
            record[f"answer{number}"] = space + answer
            layout += [f"[question{number}]", f"answer{number}"]
        return {"fields": ",".join(layout), **record}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a document hides and asks.

    Attributes:
        needles: what is hidden.
        turns: questions, with their instructions, and answers.
        used: tokens of all but the haystack and the needles.
    """

    needles: list[Needle]
    turns: tuple[tuple[str, str], ...]
    used: int


def make_documents(
    spec: NeedleDocumentsSpec,
    base: Path,
    tokenizer: TextTokenizer,
    numbers: Iterable[int] | None = None,
) -> Iterator[NeedleDocument]:
    """The documents; each depends on the spec and its own number alone.

    Args:
        spec: how many, of which length, in which words.
        base: folder that the haystack's patterns are relative to.
        tokenizer: that the model is trained with; lengths are counted in its tokens.
        numbers: which of them, from 0; None: all.

    Raises:
        DataError: no file matches, or they hold too little text.
        ValueError: ``tokens`` is too short for the needles and questions.
    """
    haystacks = Haystacks(spec.haystack, base, tokenizer)
    wording = Wording(spec.format, tokenizer)
    for number in range(spec.documents) if numbers is None else numbers:
        yield _document(spec, _seed(spec, number), haystacks, wording)


def write_documents(
    spec: NeedleDocumentsSpec, base: Path, tokenizer: TextTokenizer, to: Path
) -> tuple[int, int]:
    """Write the documents as JSONL.

    Returns:
        Documents, and their tokens in all, at most.

    Raises:
        DataError: as ``make_documents``.
        ValueError: likewise.
    """
    count = tokens = 0
    chat = spec.format.template == "chat"
    with to.open("w", encoding="utf-8") as file:
        for made in make_documents(spec, base, tokenizer):
            record = made.messages() if chat else made.fields(tokenizer.marks_words)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count, tokens = count + 1, tokens + made.tokens
    return count, tokens


def find_tokenizer(place: str) -> TextTokenizer:
    """A tokenizer by its file or folder, or the one of bytes.

    Args:
        place: what ``load_tokenizer`` takes, or ``bytes``: no tokenizer makes more tokens.

    Raises:
        DataError: there is none.
    """
    return train_tokenizer([], _BYTE_PIECES) if place == BYTES else load_tokenizer(Path(place))


def check_room(spec: NeedleDocumentsSpec, tokenizer: TextTokenizer) -> None:
    """Count what is hidden and asked, without any haystack: it takes moments, a build minutes.

    Args:
        spec: of the documents; the first few are looked at, and all are nearly alike.
        tokenizer: that the model is trained with.

    Raises:
        ValueError: ``tokens`` is too short for the needles and questions.
    """
    wording = Wording(spec.format, tokenizer)
    for number in range(min(spec.documents, _CHECKED)):
        asked = _asked(spec, _seed(spec, number), wording)
        wording.room(asked.needles, spec.tokens - asked.used)


def _seed(spec: NeedleDocumentsSpec, number: int) -> str:
    return f"{spec.seed} document {number}"


def _asked(spec: NeedleDocumentsSpec, seed: str, wording: Wording) -> _Asked:
    random_ = random.Random(seed)
    cities = draw_cities(random_, spec.needles, spec.made_up)
    numbers = draw_numbers(random_, spec.needles, spec.format.digits, evaluated=False)
    needles = [
        Needle(city, number, random_.uniform(0, 100))
        for city, number in zip(cities, numbers, strict=True)
    ]
    turns, used = [], len(wording.head)
    for turn, needle in enumerate(random_.sample(needles, spec.questions)):
        many = turn % 2 == 1 if spec.asked_as == "both" else spec.asked_as == "many"
        question = spec.format.question_of([needle.city], many)
        answer = spec.format.answer_of(needle.city, needle.number)
        used += len(wording.tail(question)) + len(wording.within(f" {answer}")) + _END
        if turn and spec.format.template == "chat":
            # It follows an eos, without a space.
            used += len(wording.within(wording.template.user_prefix))
        turns.append((question, answer))
    # A tokenizer that marks words marks a later turn's, too.
    used += len(turns) * wording.tokenizer.marks_words
    return _Asked(needles, tuple(turns), used)


def _document(
    spec: NeedleDocumentsSpec, seed: str, haystacks: Haystacks, wording: Wording
) -> NeedleDocument:
    asked = _asked(spec, seed, wording)
    room = spec.tokens - asked.used
    haystack = haystacks.draw(max(1, room), seed)
    hidden = wording.hide(haystack, asked.needles, room, place=Haystack.nearest)
    return NeedleDocument(_text(hidden, wording), asked.turns, spec.tokens)


def _text(hidden: Hidden, wording: Wording) -> str:
    """The text of a haystack with needles, its last sentence cut between words."""
    haystack: Haystack = hidden.haystack
    if not haystack.texts:
        return hidden.text("").strip()
    room = int(haystack.ends[-1] - haystack.ends[-2])
    words = haystack.texts[-1].split()
    last = haystack.texts[-1]
    while len(wording.within(last)) > room:
        words = words[: len(words) * 9 // 10]
        last = "".join(f" {word}" for word in words)
    return hidden.text(last).lstrip()
