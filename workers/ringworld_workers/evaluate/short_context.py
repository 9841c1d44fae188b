"""Whether a stage has unlearnt short contexts: the same documents for all stages of a job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from ringworld_jobs.evaluate_spec import ShortContextTask, TaskSpec
from ringworld_jobs.units import SHORTEST_CONTEXT
from ringworld_workers.evaluate.documents import (
    Document,
    longest_documents,
    losses_by_length,
    piece_items,
    score_pieces,
)
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject

LONGER, SHORTER = 4096, 1024


class ShortContext:
    """Scores the first stage's held-out documents at short lengths, with every stage's model."""

    name = "short_context"

    def __init__(self, settings: TaskSpec, subject: Subject) -> None:
        """Take what is asked; the data is opened when it is needed."""
        assert isinstance(settings, ShortContextTask)
        self._settings, self._subject = settings, subject

    @cached_property
    def _documents(self) -> list[Document]:
        subject, limit = self._subject, max(self._lengths)
        count = self._settings.documents
        return longest_documents(subject, subject.first_mixture, count, limit, self.name)

    @cached_property
    def _lengths(self) -> list[int]:
        if self._settings.lengths != "auto":
            return sorted(set(self._settings.lengths))
        longer = min(LONGER, self._subject.first_context_length)
        return [max(SHORTEST_CONTEXT, min(SHORTER, longer // 4)), longer]

    def items(self) -> Sequence[Item]:
        """Every document at every length."""
        return piece_items(self._documents, self._lengths)

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """Score them; see ``Task.run``."""
        for item in items:
            yield score_pieces(item, self._documents, ring)

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """``worse``: by which share of it the loss exceeds the best of the stages before, at the
        length where that is most (below zero: better; zero in the first stage); ``loss_at_N``."""
        losses = losses_by_length(records)
        worse = []
        for length, loss in losses.items():
            before = [
                float(found[f"loss_at_{length}"])
                for found in self._subject.earlier
                if found.get("task") == self.name
                and found.get("items") == len(records)
                and found.get(f"loss_at_{length}") is not None
            ]
            if before:
                worse.append(loss / min(before) - 1)
        return {
            "worse": max(worse, default=0.0),
            **{f"loss_at_{length}": loss for length, loss in losses.items()},
        }
