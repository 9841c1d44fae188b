"""How answers are scored: the needle test's rule, and those of question answering."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LETTER = re.compile(r"\(?\b([A-Z])\b\)?")


def holds(answer: str, expected: str) -> float:
    """The paper's rule of needles: 1 where what is expected is part of the answer, else 0."""
    return float(expected in answer)


def names(answer: str, word: str) -> float:
    """1 where the answer holds a word or number whole, whatever its case, else 0."""
    return float(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None)


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and further white space: SQuAD's, as LOFT's."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, expected: Sequence[str]) -> float:
    """1 where the normalized answer is one of those expected, else 0."""
    return float(normalized(answer) in {normalized(one) for one in expected})


def f1(answer: str, expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, against the best of those expected."""
    return max(_f1(normalized(answer).split(), normalized(one).split()) for one in expected)


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(list(said) == list(wanted))
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def letter(answer: str, options: int) -> str:
    """The letter that an answer to multiple choice names first; empty where it names none.

    Args:
        answer: such as ``B``, ``(B)``, ``The best answer is B.``.
        options: how many there are, from A on.
    """
    valid = string.ascii_uppercase[:options]
    # "A frog" names no option: the article is one only where nothing but it is said.
    said = re.sub(r"^\s*A(?=\s+[a-z])", "", answer)
    return next((found for found in _LETTER.findall(said) if found in valid), "")


def recall(answer: str, wanted: Sequence[str]) -> float:
    """Share of wanted ids that the answer names."""
    return sum(names(answer, one) for one in wanted) / len(wanted)
