"""Retrieval, question answering and multiple choice on one's own questions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringworld_jobs.evaluate_questions import QuestionsTask
from ringworld_jobs.needle_format import NeedleFormat
from ringworld_model.batch import TEXT
from ringworld_model.sampling.prompt import Prompt
from ringworld_model.tokens import Span
from ringworld_workers.data.chat_template import Turn
from ringworld_workers.evaluate.asking import Asker
from ringworld_workers.evaluate.haystack import encode_within
from ringworld_workers.evaluate.needle import LINE_END, mean
from ringworld_workers.evaluate.needle_prompt import Wording
from ringworld_workers.evaluate.question_records import (
    INSTRUCTIONS,
    Question,
    read_corpus,
    read_questions,
)
from ringworld_workers.evaluate.scoring import exact, f1, letter, normalized, recall
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject
from ringworld_workers.generation.prompts import Clip, codes_of, spans_of

_LISTED = re.compile(r"""\[\s*(['"].*?['"])\s*\]""", re.DOTALL)
_QUOTED = re.compile(r"""(['"])(.*?)\1(?=\s*(?:,|$))""", re.DOTALL)
_MAX_SHOWN = 200


class Questions:
    """The questions of the files, each asked once."""

    name = "questions"

    def __init__(self, settings: QuestionsTask, subject: Subject) -> None:
        """Read the questions; nothing is tokenized yet.

        Raises:
            DataError: a file is missing, or a line is no question.
            RequestError: there are videos, and the model has no codebook.
        """
        self._settings, self._subject = settings, subject
        self._loaded = subject.loaded
        self._questions = {question.id: question for question in read_questions(settings)}
        if any(question.video for question in self._questions.values()):
            subject.loaded.need_codebook("evaluate.questions with videos")
        words = NeedleFormat(template=settings.template)
        self._wording = Wording(words, subject.loaded.tokenizer, subject.loaded.template)
        self._corpus: list[int] | None = None
        self._clip: tuple[Path, npt.NDArray[np.int32]] | None = None

    def items(self) -> Sequence[Item]:
        """One for each question; those on one text or video follow each other as in the file."""
        return [
            Item(
                question.id,
                {
                    "kind": question.kind,
                    "question": question.text[:_MAX_SHOWN],
                    "expected": list(question.expected),
                    **({"group": question.group} if question.group else {}),
                },
            )
            for question in self._questions.values()
        ]

    def run(self, items: Sequence[Item], ring: EvaluationRing) -> Iterator[Record]:
        """See ``Task.run``; scores are those of ``score``."""
        limit = self._subject.context_length
        stop = (LINE_END,) if self._settings.template == "plain" else ()
        asker = Asker(
            ring,
            limit,
            self._settings.answer_tokens,
            self._settings.batch_tokens or 2 * limit,
            stop=stop,
        )
        asked = (
            ((question, len(prompt)), prompt)
            for question in (self._questions[item.id] for item in items)
            for prompt in [self._prompt(question)]
        )
        for (question, tokens), answer in asker.ask_all(asked):
            yield {
                "id": question.id,
                "answer": answer.text,
                **score(question, answer.text),
                "prompt_tokens": tokens,
                "answer_tokens": answer.tokens,
            }

    def summarize(self, records: Sequence[Record]) -> dict[str, float]:
        """Means of what applies: ``exact``, ``f1``, ``contains``; ``recall``; ``accuracy``; and of
        each group, such as ``accuracy_of_long``."""
        figures: dict[str, list[float]] = {}
        for record in records:
            for name in ("exact", "f1", "contains", "recall", "accuracy"):
                if name in record:
                    figures.setdefault(name, []).append(record[name])
                    if record.get("group"):
                        figures.setdefault(f"{name}_of_{record['group']}", []).append(record[name])
        return {name: mean(values) for name, values in figures.items()}

    def _prompt(self, question: Question) -> Prompt:
        settings = self._settings
        instruction = settings.instruction
        if instruction is None:
            instruction = INSTRUCTIONS[question.kind] if settings.template == "chat" else ""
        asked = f"{question.text} {instruction}" if instruction else question.text
        if question.video is not None:
            prompt = self._of_video(question.video, asked)
        else:
            ids = [*self._wording.head, *self._context(question), *self._wording.tail(asked)]
            prompt = Prompt.of(Span(ids, TEXT))
        limit = self._subject.context_length
        if len(prompt) + settings.answer_tokens > limit:
            raise ValueError(
                f"evaluate.questions: {question.place}: {len(prompt):,} tokens and "
                f"{settings.answer_tokens} for the answer exceed the context of {limit:,}; shorten "
                f"the text, take fewer frames, or ask a model of a longer context"
            )
        return prompt

    def _of_video(self, video: Path, asked: str) -> Prompt:
        settings, loaded = self._settings, self._loaded
        if self._clip is None or self._clip[0] != video:
            clip = Clip(video, fps=settings.fps, num_frames=settings.frames)
            self._clip = video, codes_of(clip, loaded)
        codes = self._clip[1]
        if settings.template == "chat":
            return Prompt.of(
                *spans_of(loaded.template.prompt([Turn("user", (asked, codes))]), loaded)
            )
        raise ValueError("evaluate.questions.template: plain takes no video; write chat")

    def _context(self, question: Question) -> list[int]:
        if question.context:
            (found,) = encode_within(self._loaded.tokenizer, [f" {question.context}"])
            return found
        if self._settings.corpus is None:
            return []
        if self._corpus is None:
            self._corpus = self._corpus_ids(self._settings.corpus)
        return self._corpus

    def _corpus_ids(self, pattern: str) -> list[int]:
        """The corpus, or as much of it as fits beside the longest question."""
        passages = read_corpus(pattern)
        texts = [passage.spelled() for passage in passages]
        encoded = encode_within(self._loaded.tokenizer, texts)
        questions = self._questions.values()
        longest = max(
            len(self._wording.tail(f"{question.text} {INSTRUCTIONS[question.kind]}"))
            for question in questions
        )
        given = self._wording.tail(self._settings.instruction or "")
        room = self._subject.context_length - self._settings.answer_tokens
        room -= len(self._wording.head) + longest + len(given)
        wanted = {name for question in questions for name in question.passages}
        unknown = wanted - {passage.id for passage in passages}
        if unknown:
            raise ValueError(
                f"evaluate.questions.corpus: {len(unknown)} passages that questions name are not "
                f"in it, such as {min(unknown)!r}; give the corpus of these questions"
            )
        needed = [passage.id in wanted for passage in passages]
        room -= sum(len(ids) for ids, need in zip(encoded, needed, strict=True) if need)
        if room < 0:
            raise ValueError(
                f"evaluate.questions.corpus: the passages that questions name exceed the context "
                f"of {self._subject.context_length:,} tokens by {-room:,}; ask fewer questions at "
                f"a time, or a model of a longer context"
            )
        found: list[int] = []
        for ids, need in zip(encoded, needed, strict=True):
            if need or len(ids) <= room:
                room -= 0 if need else len(ids)
                found += ids
        return found


def score(question: Question, answer: str) -> dict[str, float]:
    """What an answer is worth.

    An answer is normalized as SQuAD's and LOFT's scripts do; where it ends in a list in brackets,
    as LOFT asks for, the first of it counts.

    Returns:
        ``score``, and what it is: ``accuracy`` of a letter, ``recall`` of passages, ``exact`` of a
        text, with ``f1`` and ``contains`` (an expected text is part of the answer).
    """
    if question.kind == "choose":
        right = float(letter(answer, question.options) == question.expected[0])
        return {"score": right, "accuracy": right}
    if question.kind == "retrieve":
        share = recall(answer, question.expected)
        return {"score": share, "recall": share}
    listed = _LISTED.findall(answer)
    said = answer
    if listed:
        found = _QUOTED.search(listed[-1])
        said = found[2] if found else answer
    contains = any(normalized(one) in normalized(answer) for one in question.expected)
    right = exact(said, question.expected)
    return {
        "score": right,
        "exact": right,
        "f1": f1(said, question.expected),
        "contains": float(contains),
    }
