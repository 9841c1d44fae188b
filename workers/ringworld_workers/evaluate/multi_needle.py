"""Several needles in a haystack, of which some are asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from ringworld_jobs.evaluate_needles import MultiNeedleTask
from ringworld_model.sampling.prompt import Prompt
from ringworld_workers.evaluate.cities import draw_cities, draw_numbers
from ringworld_workers.evaluate.needle import HaystackAsker, mean, text_prompt
from ringworld_workers.evaluate.needle_prompt import Needle, NeedlePrompt
from ringworld_workers.evaluate.scoring import holds
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject


class MultiNeedle:
    """Lengths x cases x rounds; cases that hide equally many ask about the same document."""

    name = "multi_needle"

    def __init__(self, settings: MultiNeedleTask, subject: Subject) -> None:
        """Find the texts.

        Raises:
            DataError: there are none.
        """
        self._settings = settings
        self._shared = HaystackAsker(settings, subject)

    def items(self) -> Sequence[Item]:
        """One for each length, round and case; those that share a document follow each other."""
        settings, shared = self._settings, self._shared
        cases = sorted({(hidden, asked) for hidden, asked in settings.cases})
        made = []
        for length in settings.length_list(shared.context_length):
            for round_ in range(settings.rounds):
                for hidden, asked in cases:
                    document = f"{length}-{hidden}-{round_}"
                    draw = random.Random(f"{shared.seed} multi_needle {document}")
                    cities = draw_cities(draw, hidden)
                    digits = settings.format.digits
                    numbers = draw_numbers(draw, hidden, digits, evaluated=True)
                    depths = draw.sample(settings.depth_list(), hidden)
                    chosen = draw.sample(range(hidden), hidden)[:asked]
                    facts: dict[str, Any] = {"length": length, "hidden": hidden, "asked": asked}
                    facts |= {"round": round_, "cities": cities, "numbers": numbers}
                    facts |= {"depths": depths}
                    facts |= {"expected": {cities[at]: numbers[at] for at in chosen}}
                    made.append(Item(f"{document}-{asked}", facts))
        return made

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """See ``Task.run``.

        The score is the share of the numbers asked for that are part of the answer. ``others`` are
        numbers in it that were not asked for: they cost nothing by the paper's rule.
        """
        for (item, made), answer in self._shared.asker(ring).ask_all(self._asked(items)):
            expected = item.facts["expected"]
            found = {city: holds(answer.text, number) for city, number in expected.items()}
            rest = [number for number in item.facts["numbers"] if number not in expected.values()]
            yield {
                "id": item.id,
                "placed": list(made.depths),
                "answer": answer.text,
                "found": found,
                "others": sum(number in answer.text for number in rest),
                "score": mean(list(found.values())),
                "prompt_tokens": len(made.tokens),
                "answer_tokens": answer.tokens,
            }

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """``accuracy``, and that of each length and case: ``accuracy_4_hidden_2_asked_at_8192``."""
        cases: dict[str, list[float]] = {}
        for record in records:
            name = f"accuracy_{record['hidden']}_hidden_{record['asked']}_asked"
            cases.setdefault(f"{name}_at_{record['length']}", []).append(record["score"])
        whole = {"accuracy": mean([record["score"] for record in records])}
        return whole | {name: mean(scores) for name, scores in cases.items()}

    def _asked(self, items: Sequence[Item]) -> Iterator[tuple[tuple[Item, NeedlePrompt], Prompt]]:
        for item in items:
            facts = item.facts
            needles = [
                Needle(*each)
                for each in zip(facts["cities"], facts["numbers"], facts["depths"], strict=True)
            ]
            asked = self._settings.format.question_of(list(facts["expected"]), of_many=True)
            made = self._shared.prompt(facts["length"], facts["round"], needles, asked)
            yield (item, made), text_prompt(made)
