"""One needle in a haystack: does the model find it, by context length and depth?"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from ringworld_jobs.evaluate_needles import HaystackTask, NeedleTask
from ringworld_model.batch import TEXT
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.tokens import Span
from ringworld_workers.evaluate.asking import Asker
from ringworld_workers.evaluate.cities import draw_cities, draw_numbers
from ringworld_workers.evaluate.haystack import Haystack, Haystacks
from ringworld_workers.evaluate.needle_prompt import Needle, NeedlePrompt, Wording
from ringworld_workers.evaluate.scoring import holds
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject

LINE_END = "\n"
"""What ends the answer of a model that only continues text."""


class HaystackAsker:
    """What the tests with needles in text share: texts, words, and how a ring is asked."""

    def __init__(self, settings: HaystackTask, subject: Subject) -> None:
        """Find the texts.

        Raises:
            DataError: there are none.
        """
        loaded = subject.loaded
        self.settings = settings
        self.seed = subject.seed if settings.seed is None else settings.seed
        self.context_length = subject.context_length
        self.wording = Wording(settings.format, loaded.tokenizer, loaded.template)
        self._haystacks = Haystacks(settings.haystack, Path(), loaded.tokenizer)
        self._drawn: tuple[tuple[int, int], Haystack] | None = None

    def haystack(self, length: int, round_: int) -> Haystack:
        """The text of a length and round, the same for all depths and cases."""
        if self._drawn is None or self._drawn[0] != (length, round_):
            seed = f"{self.seed} haystack {length} {round_}"
            self._drawn = (length, round_), self._haystacks.draw(length, seed)
        return self._drawn[1]

    def prompt(
        self, length: int, round_: int, needles: Sequence[Needle], question: str
    ) -> NeedlePrompt:
        """A prompt that with its answer has exactly so many tokens.

        Raises:
            ValueError: the length does not hold the words.
        """
        tokens = length - self.settings.answer_tokens
        try:
            return self.wording.prompt(self.haystack(length, round_), needles, question, tokens)
        except ValueError as error:
            raise ValueError(f"lengths: {length:,} tokens: {error}") from error

    def asker(self, ring: EvaluationRing) -> Asker:
        """What asks a ring."""
        plain = self.settings.format.template == "plain"
        return Asker(
            ring,
            self.context_length,
            self.settings.answer_tokens,
            self.settings.batch_tokens or 2 * self.context_length,
            stop=(LINE_END,) if plain else (),
        )


class SingleNeedle:
    """Lengths x depths x rounds, each with a city and a number of its own."""

    name = "needle"

    def __init__(self, settings: NeedleTask, subject: Subject) -> None:
        """Find the texts.

        Raises:
            DataError: there are none.
        """
        self._settings = settings
        self._shared = HaystackAsker(settings, subject)

    def items(self) -> Sequence[Item]:
        """One for each length, round and depth, the deepest first: the text before a needle is then
        read once for all that stand further up."""
        settings, shared = self._settings, self._shared
        made = []
        for length in settings.length_list(shared.context_length):
            for round_ in range(settings.rounds):
                for depth in sorted(settings.depth_list(), reverse=True):
                    name = f"{length}-{depth:g}-{round_}"
                    draw = random.Random(f"{shared.seed} needle {name}")
                    (city,) = draw_cities(draw, 1)
                    (number,) = draw_numbers(draw, 1, settings.format.digits, evaluated=True)
                    facts = {"length": length, "depth": depth, "round": round_}
                    made.append(Item(name, {**facts, "city": city, "expected": number}))
        return made

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """See ``Task.run``; the score is 1 where the number is part of the answer, else 0."""
        asker = self._shared.asker(ring)
        for (item, made), answer in asker.ask_all(self._asked(items)):
            yield {
                "id": item.id,
                "placed": made.depths[0],
                "answer": answer.text,
                "score": holds(answer.text, item.facts["expected"]),
                "prompt_tokens": len(made.tokens),
                "answer_tokens": answer.tokens,
            }

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """``accuracy``, that of each length (``accuracy_at_8192``), and of the worst cell."""
        cells: dict[tuple[int, float], list[float]] = {}
        lengths: dict[int, list[float]] = {}
        for record in records:
            cells.setdefault((record["length"], record["depth"]), []).append(record["score"])
            lengths.setdefault(record["length"], []).append(record["score"])
        return {
            "accuracy": mean([record["score"] for record in records]),
            **{f"accuracy_at_{length}": mean(scores) for length, scores in lengths.items()},
            "accuracy_of_worst_cell": min(map(mean, cells.values())),
        }

    def _asked(self, items: Sequence[Item]) -> Iterator[tuple[tuple[Item, NeedlePrompt], Prompt]]:
        for item in items:
            facts = item.facts
            needle = Needle(facts["city"], facts["expected"], facts["depth"])
            question = self._settings.format.question_of([needle.city], of_many=False)
            made = self._shared.prompt(facts["length"], facts["round"], [needle], question)
            yield (item, made), text_prompt(made)


def text_prompt(made: NeedlePrompt) -> Prompt:
    """A prompt of text as a session takes it."""
    return Prompt.of(Span(made.tokens, TEXT))


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of none."""
    return sum(values) / len(values) if values else 0.0
