"""Many questions, some at a time: each answer is handed on as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ringworld_jobs.prompts_file import PromptLine
from ringworld_model.sampling.answer import Answer
from ringworld_workers.generation.asks import Ask
from ringworld_workers.generation.local_ring import LocalRing
from ringworld_workers.generation.source import RequestError


@dataclass(frozen=True)
class Answered:
    """What became of a line.

    Attributes:
        line: the question.
        ask: what the model was asked; None: it could not be.
        answer: what it said.
        problem: why there is none; empty: there is one.
    """

    line: PromptLine
    ask: Ask | None
    answer: Answer
    problem: str = ""


def answer_lines(
    ring: LocalRing,
    lines: Sequence[PromptLine],
    make_ask: Callable[[PromptLine], Ask],
    batch: int,
    on_token: Callable[[], None] = lambda: None,
) -> Iterator[Answered]:
    """Ask line after line, ``batch`` of them at the same time.

    What a line's answer is does not depend on the batch that it is in.

    Args:
        ring: entered.
        lines: in order.
        make_ask: turns a line into what is asked.
        batch: lines at a time.
        on_token: told of each token.

    Yields:
        Every line, a batch's in the order in which they end.
    """
    for first in range(0, len(lines), batch):
        asked: list[tuple[PromptLine, Ask]] = []
        for line in lines[first : first + batch]:
            try:
                asked.append((line, make_ask(line)))
            except RequestError as error:
                yield Answered(line, None, Answer(), str(error))
        if not asked:
            continue
        answers = [Answer() for _ in asked]
        for event in ring.call("answer", [ask for _, ask in asked]):
            on_token()
            answers[event.prompt].add(event)
            if event.end is not None:
                line, ask = asked[event.prompt]
                yield Answered(line, ask, answers[event.prompt])
