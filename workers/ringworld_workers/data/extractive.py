"""Questions about facts that stand in a text, found by their form: no model, no server.

A fact is an amount, a share, a date, a year, a number or a name. The question quotes or turns round
the sentence that states it, so it can be answered from the text, and from nowhere else in it: the
fact stands once in its chunk, the sentence once in its document.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringworld_workers.data.chunks import sentences
from ringworld_workers.data.qa_generator import NoQuestion, QuestionAnswer

_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_SCALE = r"(?:[MBK]\b| (?:hundred|thousand|million|billion|trillion)\b)?"
_CAPITAL = r"[A-Z][a-z]+(?:-[A-Z][a-z]+)?"
_UNITS = "one|two|three|four|five|six|seven|eight|nine"
_SPELLED = (
    rf"\b(?:(?:(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:-(?:{_UNITS}))?"
    rf"|{_UNITS}|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen)"
    r"(?: (?:hundred|thousand|million|billion)\b)+"
    rf"|(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:-(?:{_UNITS}))?\b)"
)
_FACTS: tuple[tuple[str, int, re.Pattern[str]], ...] = (
    ("date", 4, re.compile(r"\b\d{4}-\d\d-\d\d\b")),
    ("amount", 4, re.compile(rf"[$\u00a3\u20ac] ?{_NUMBER}{_SCALE}")),
    ("percentage", 4, re.compile(rf"{_NUMBER} ?(?:%|per ?cent\b)")),
    ("date", 4, re.compile(rf"\b(?:{_MONTH}) \d{{1,2}}(?:, \d{{4}})?\b")),
    ("year", 3, re.compile(r"\b(?:1[4-9]|20)\d\d\b(?![,.]?\d)")),
    # Two digits at least: a lone one is mostly an editor's "one".
    ("number", 3, re.compile(rf"(?<![-\d.,])(?=\d[\d,.]+|\d [hmbt]){_NUMBER}{_SCALE}\b(?![-\d])")),
    ("number", 3, re.compile(_SPELLED)),
    ("name", 2, re.compile(rf"\b{_CAPITAL}(?: (?:of (?:the )?)?{_CAPITAL})+\b(?!\.\S)")),
    ("name", 1, re.compile(rf"\b{_CAPITAL}\b")),
)
"""What is asked for, how much it is preferred, and how it looks; the first to match a place has
it."""

_STATED = re.compile(
    r"^(?P<subject>(?:The|Our|Their|Its|His) [a-z][^,;:()]*?) "
    r"(?P<verb>amounted to|amount to|was|were|is|are)"
    r"(?P<about> about| nearly| only| over)? $"
)
_NOT_A_SUBJECT = re.compile(
    r"\b(?:which|that|who|whom|was|were|is|are|be|been|has|had|have|will|would|shall|did|do|does)\b"
)
_HOW = {"amount": "How much", "number": "How many", "percentage": "How much"}
_FOLLOWS = re.compile(r"^(?:[.,;]|$)")
_SHORTEST, _LONGEST = 40, 400
"""Characters of a sentence that is asked about: shorter ones say too little."""
_WORDS_AROUND = 24
"""Words of a sentence that a question quotes on each side of its gap."""
_LEAST_WORDS = 7
"""Words around a gap at least, or the question could mean anything."""
_NO_NAMES = frozenset(
    "The This That These Those There Their They Then When Where While With Without What Which Who "
    "We Our Us You Your He His She Her It Its In On At By For From To Of And Or But If As So Such "
    "No Not Nor Yet Let Mr Mrs God I My Me A An All Both Each Every Some Any Many Most More One "
    "Two Three First Second Third Fourth Fifth Sixth Seventh Last Next Also Now Here How Why "
    "Government Nation State States Congress House Senate Governments Nations Executive".split()
) | frozenset(_MONTH.split("|"))
"""Capitalised words that are no name, or say nothing as an answer."""
_ADJECTIVES = ("an", "al", "ish", "ese")
"""Ends of capitalised words that are mostly no names: American, Federal, English."""


@dataclass(frozen=True, slots=True)
class _Fact:
    """An answer and its sentence, cut at the answer."""

    kind: str
    weight: int
    before: str
    answer: str
    after: str


class ExtractiveGenerator:
    """Asks for facts that stand in the chunk. English forms; other languages give fewer facts."""

    def ask(self, chunks: Sequence[str], document: str) -> list[QuestionAnswer | NoQuestion]:
        """The best fact of each chunk as a question; depends on the text alone."""
        flat = _flat(document)
        return [self._one(chunk, flat) for chunk in chunks]

    def _one(self, chunk: str, document: str) -> QuestionAnswer | NoQuestion:
        flat = _flat(chunk)
        ranked = sorted(_facts(chunk, flat), key=_rank)
        for fact in ranked:
            if document.count(fact.before + fact.answer + fact.after) == 1:
                return QuestionAnswer(_question(fact, document), fact.answer)
        return NoQuestion("chunks without a fact to ask for", unusable=False)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _facts(chunk: str, flat: str) -> Iterator[_Fact]:
    for start, stop in sentences(chunk):
        sentence = _flat(chunk[start:stop])
        if not _SHORTEST <= len(sentence) <= _LONGEST or not _whole(sentence):
            continue
        taken: list[tuple[int, int]] = []
        for kind, weight, pattern in _FACTS:
            for match in pattern.finditer(sentence):
                begin, end = match.span()
                if any(begin < b and a < end for a, b in taken):
                    continue
                taken.append((begin, end))
                fact = _Fact(kind, weight, sentence[:begin], match[0], sentence[end:])
                if _worth_asking(fact, flat):
                    yield fact


def _whole(sentence: str) -> bool:
    """Whether it is a sentence without quotes, which would break the question's, or remarks."""
    return (
        sentence[0].isupper() and sentence[-1] in ".!?" and not re.search(r"[\"\u201c\[]", sentence)
    )


def _worth_asking(fact: _Fact, chunk: str) -> bool:
    words = len(fact.before.split()) + len(fact.after.split())
    if words < _LEAST_WORDS:
        return False
    if fact.kind == "name":
        # The first word of a sentence is capitalised whatever it is.
        words_of = fact.answer.split()
        if not fact.before.strip() or _NO_NAMES & set(words_of):
            return False
        # Old texts capitalise nouns; what they also write in lower case is one.
        if len(words_of) == 1 and (
            fact.answer.endswith(_ADJECTIVES) or re.search(rf"\b{fact.answer.lower()}\b", chunk)
        ):
            return False
    elif fact.kind == "number" and re.search(
        r"(?:No\.|Nos\.|section|article|chapter|\(|\$) ?$", fact.before, re.IGNORECASE
    ):
        return False
    edge = rf"(?<![\w$]){re.escape(fact.answer)}(?![\w%]|[.,]\d)"
    return len(re.findall(edge, chunk)) == 1


def _rank(fact: _Fact) -> tuple[int, str]:
    """Best first; among equals a digest decides, so that the places are spread over the chunk."""
    bonus = 2 if _turned_round(fact) else 0
    content = f"{fact.before}\0{fact.answer}\0{fact.after}"
    return -fact.weight - bonus, hashlib.sha256(content.encode()).hexdigest()


def _question(fact: _Fact, document: str) -> str:
    turned = _turned_round(fact)
    # "The receipts of the year" may stand elsewhere with another sum; the whole sentence does not.
    if turned and document.lower().count(fact.before.lower().rsplit(" ", 2)[0]) == 1:
        return turned
    before, after = fact.before.split(" "), fact.after.split(" ")
    if len(before) > _WORDS_AROUND:
        before = ["...", *before[-_WORDS_AROUND:]]
    if len(after) > _WORDS_AROUND:
        after = [*after[:_WORDS_AROUND], "..."]
    return f'Which {fact.kind} fills the gap in "{" ".join(before)}____{" ".join(after)}"?'


def _turned_round(fact: _Fact) -> str:
    """``The receipts were $5.`` as ``How much were the receipts?``; empty where it cannot be."""
    stated = _STATED.match(fact.before)
    if stated is None or fact.kind not in _HOW or not _FOLLOWS.match(fact.after):
        return ""
    subject, verb = stated["subject"], stated["verb"]
    if _NOT_A_SUBJECT.search(subject) or len(subject.split()) > 16 or len(subject.split()) < 4:
        return ""
    subject = subject[0].lower() + subject[1:]
    if " number " in subject:
        return f"What {verb} {subject}?"
    if verb.startswith("amount"):
        return f"How much {'did' if verb == 'amounted to' else 'do'} {subject} amount to?"
    return f"{_HOW[fact.kind]} {verb} {subject}?"
