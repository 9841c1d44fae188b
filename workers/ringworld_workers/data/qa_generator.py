"""Who asks and answers a question about a chunk of text: the seam, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """A question about a chunk, and its answer; neither is blank."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class NoQuestion:
    """Why a chunk has no question.

    Attributes:
        reason: for the list of what was left out.
        unusable: as a ``Refused``'s: False where the text simply holds nothing to ask for.
    """

    reason: str
    unusable: bool


class QaGenerator(Protocol):
    """Asks about chunks; the same chunks give the same questions."""

    def ask(self, chunks: Sequence[str], document: str) -> list[QuestionAnswer | NoQuestion]:
        """One question for each chunk, in order.

        Args:
            chunks: parts of the document.
            document: all of it: a question should have one answer in it.

        Raises:
            Unavailable: no question can be had at all, for the generator is not there or refuses.
        """
