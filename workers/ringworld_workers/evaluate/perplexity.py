"""Loss against context length: the same targets, predicted from ever more of what is before them.

A document is cut into pieces of 1Ki, then of 2Ki and so on; a token sees nothing before its piece.
So every length has the same targets, and only the context differs. (The loss of the first 1Ki and
of the first 2Ki tokens, which is cheaper to have, would compare beginnings with middles.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from ringworld_jobs.evaluate_spec import PerplexityTask, TaskSpec
from ringworld_jobs.units import SHORTEST_CONTEXT
from ringworld_workers.evaluate.documents import (
    Document,
    longest_documents,
    losses_by_length,
    piece_items,
    score_pieces,
)
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject

SHORTEST = 1024
PIECES = 8
"""In a short context, the shortest pieces are this part of it."""


class Perplexity:
    """Scores held-out documents at each length."""

    name = "perplexity"

    def __init__(self, settings: TaskSpec, subject: Subject) -> None:
        """Take what is asked; the data is opened when it is needed."""
        assert isinstance(settings, PerplexityTask)
        self._settings, self._subject = settings, subject

    @cached_property
    def _documents(self) -> list[Document]:
        subject, count = self._subject, self._settings.documents
        limit = subject.context_length
        if self._settings.lengths != "auto":
            limit = max(self._settings.lengths)
        return longest_documents(subject, subject.mixture, count, limit, self.name)

    @cached_property
    def _lengths(self) -> list[int]:
        if self._settings.lengths != "auto":
            return sorted(set(self._settings.lengths))
        longest = max(document.tokens for document in self._documents)
        return [
            length
            for length in doubled(self._subject.context_length)
            # Beyond the longest document, a length would be the one before it again.
            if length < 2 * longest
        ]

    def items(self) -> Sequence[Item]:
        """Every document at every length."""
        return piece_items(self._documents, self._lengths)

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """Score them; see ``Task.run``."""
        for item in items:
            yield score_pieces(item, self._documents, ring)

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """``loss`` at the greatest length, ``gain`` over the shortest (nats per target), and
        ``loss_at_N`` of each."""
        losses = losses_by_length(records)
        found = list(losses.values())
        return {
            "loss": found[-1],
            "gain": found[0] - found[-1],
            **{f"loss_at_{length}": loss for length, loss in losses.items()},
        }


def doubled(context_length: int) -> list[int]:
    """1Ki, 2Ki, 4Ki and so on up to a context, and that; from an eighth of one below 8Ki."""
    length = SHORTEST
    if context_length < PIECES * SHORTEST:
        length = max(SHORTEST_CONTEXT, context_length // PIECES)
    lengths = []
    while length < context_length:
        lengths.append(length)
        length *= 2
    return [*lengths, context_length]
