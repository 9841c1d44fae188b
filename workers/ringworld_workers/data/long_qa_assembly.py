"""One long document made into examples of a target length, with questions after each.

Each chunk is asked about once and belongs to one example; only to fill an example up to its length
are sentences of the next chunk shown early, without their question.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ringworld_jobs.recipe_text import LongQaDataset
from ringworld_workers.data.chat_template import ChatTemplate, Turn
from ringworld_workers.data.chunks import Chunk, Piece, cut_chunks
from ringworld_workers.data.draft import Part, Refused, TextPart
from ringworld_workers.data.qa_generator import NoQuestion, QaGenerator, QuestionAnswer
from ringworld_workers.data.text_sources import Document
from ringworld_workers.data.tokenizer import TextTokenizer

QUESTION_TOKENS = 64
"""What a question and its answer are taken to need before they are known."""
_FILLED = 0.99
"""Share of the target from which an example counts as full."""
_ROUNDS = 6
"""How often an example's length is corrected by its exact count."""


@dataclass(slots=True)
class _Asked:
    """What came of asking about a chunk."""

    turns: list[Turn] = field(default_factory=list)
    tokens: int = 0


class Assembly:
    """One document's examples."""

    def __init__(
        self,
        document: Document,
        dataset: LongQaDataset,
        tokenizer: TextTokenizer,
        generator: QaGenerator,
    ) -> None:
        """Cut the document into chunks; nothing is asked yet.

        Args:
            document: of any length.
            dataset: lengths, questions and template.
            tokenizer: what everything is counted with.
            generator: asked about chunks.
        """
        self.document, self.dataset = document, dataset
        self.tokenizer, self.generator = tokenizer, generator
        self.template = ChatTemplate(dataset.system, dataset.user_prefix, dataset.assistant_prefix)
        self.chunks = cut_chunks(document.text, dataset.chunk_tokens, self._within)
        self.asked: dict[int, _Asked] = {}
        self.problems: list[Refused] = []

    def examples(self) -> Iterator[tuple[str, tuple[Part, ...]] | Refused]:
        """Each example's name and parts, and what was left out.

        No example exceeds the target; each ends within a hundredth, or a sentence, of it, but for
        the document's last.

        Raises:
            Unavailable: the generator fails.
        """
        if self.dataset.questions is None:
            self._ask(range(len(self.chunks)))
        first = 0
        while first < len(self.chunks):
            stop = self._reach(first)
            made, stop = self._fit(first, stop)
            yield from self.problems
            self.problems.clear()
            yield made
            first = stop

    def _reach(self, first: int) -> int:
        """One past the last chunk that should fit beside its question, at least one."""
        most = self.dataset.questions
        used = self._cost(self._parts("", [])) + 1
        stop = first
        while stop < len(self.chunks):
            used += self.chunks[stop].tokens
            if most is None:
                used += self.asked[stop].tokens
            elif stop - first < most:
                used += QUESTION_TOKENS
            if used > self.dataset.target_tokens and stop > first:
                break
            stop += 1
        return stop

    def _fit(self, first: int, stop: int) -> tuple[tuple[str, tuple[Part, ...]] | Refused, int]:
        """The example of chunks first .. stop - 1, or of fewer, filled up and counted exactly.

        Returns:
            Its name and parts, or why there is none; and the next example's first chunk.
        """
        while True:
            name = f"{self.document.name}, chunks {first + 1} to {stop}"
            turns = self._questions(first, stop)
            if not turns:
                return Refused(name, "stretches without a question", unusable=False), stop
            filled = self._fill(first, stop, turns)
            if filled is not None:
                return (name, filled), stop
            if stop - first == 1:
                limit = f"target_tokens, {self.dataset.target_tokens:,}"
                return Refused(name, f"the chunk and its question exceed {limit}; raise it"), stop
            stop -= 1

    def _fill(self, first: int, stop: int, turns: Sequence[Turn]) -> tuple[Part, ...] | None:
        """The longest example found that fits: the chunks, and sentences of those after them."""
        target, text = self.dataset.target_tokens, self.document.text
        begin, end = self.chunks[first].start, self.chunks[stop - 1].stop
        more = self._after(stop)
        best: tuple[Part, ...] | None = None
        taken, best_taken = 0, 0
        for _ in range(_ROUNDS):
            made = self._parts(text[begin : more[taken - 1].stop if taken else end], turns)
            room = target - self._cost(made)
            if room >= 0:
                best, best_taken = made, taken
                if room <= (1 - _FILLED) * target:
                    break
                while taken < len(more) and room >= more[taken].tokens:
                    room -= more[taken].tokens
                    taken += 1
            else:
                while taken and room < 0:
                    taken -= 1
                    room += more[taken].tokens
            if best is None and room < 0 or best is not None and taken <= best_taken:
                break
        return best

    def _after(self, stop: int) -> list[Piece]:
        """Pieces that follow a chunk, as many as could ever be used."""
        found: list[Piece] = []
        tokens = 0
        for chunk in self.chunks[stop:]:
            if tokens > self.dataset.target_tokens:
                break
            found += chunk.pieces
            tokens += chunk.tokens
        return found

    def _questions(self, first: int, stop: int) -> list[Turn]:
        """Turns about the chunks, in an order that tells nothing of where the answers lie."""
        most = self.dataset.questions
        chosen: Sequence[int] = range(first, stop)
        if most is not None and most < stop - first:
            chosen = [first + (2 * k + 1) * (stop - first) // (2 * most) for k in range(most)]
        self._ask(chosen)
        pairs = [self.asked[index].turns for index in chosen if self.asked[index].turns]
        seed = hashlib.sha256(f"{identity(self.document)}\0{first}".encode()).digest()
        random.Random(seed).shuffle(pairs)
        return [turn for pair in pairs for turn in pair]

    def _ask(self, indices: Sequence[int]) -> None:
        new = [index for index in indices if index not in self.asked]
        texts = [self._text(self.chunks[index]) for index in new]
        found = self.generator.ask(texts, self.document.text) if new else []
        for index, answer in zip(new, found, strict=True):
            self.asked[index] = self._noted(index, answer)

    def _noted(self, index: int, found: QuestionAnswer | NoQuestion) -> _Asked:
        if isinstance(found, NoQuestion):
            name = f"{self.document.name}, chunk {index + 1}"
            self.problems.append(Refused(name, found.reason, found.unusable))
            return _Asked()
        turns = [Turn("user", (found.question,)), Turn("assistant", (found.answer,))]
        prefixes = f"{self.dataset.user_prefix} {self.dataset.assistant_prefix}"
        texts = [f"{prefixes} {found.question}", f" {found.answer}"]
        return _Asked(turns, sum(self._counts(texts)) + 1)

    def _text(self, chunk: Chunk) -> str:
        return self.document.text[chunk.start : chunk.stop].strip()

    def _parts(self, context: str, turns: Sequence[Turn]) -> tuple[Part, ...]:
        """The example: the first question follows the text, the others are turns of their own."""
        if not turns:
            turns = [Turn("user", ("?",)), Turn("assistant", ("!",))]
        said = (context.strip(), *turns[0].content) if context.strip() else turns[0].content
        return self.template.parts([Turn("user", said), *turns[1:]])

    def _cost(self, example: Sequence[Part]) -> int:
        """Tokens of an example, exactly."""
        marks = self.tokenizer.marks_words
        texts = [part.spelled(marks) for part in example if isinstance(part, TextPart)]
        return sum(self._counts(texts)) + len(example) - len(texts)

    def _counts(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer.encode_batch(texts)]

    def _within(self, texts: Sequence[str]) -> list[int]:
        """Tokens of texts that stand within a longer one, where no word needs a mark of its own."""
        if self.tokenizer.marks_words:
            texts = [text.removeprefix(" ") for text in texts]
        return self._counts(texts)


def identity(document: Document) -> str:
    """A document is its text: its copies go to one split, and so do all of its examples."""
    return hashlib.sha256(document.text.encode()).hexdigest()
