"""Haystacks, prompts and training documents of needle tests: exact lengths, the same words."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from ringworld_jobs.needle_format import HaystackSpec, NeedleDocumentsSpec, NeedleFormat
from ringworld_workers.data.chat_template import ChatTemplate, Turn
from ringworld_workers.data.draft import Part, TextPart
from ringworld_workers.data.files import DataError
from ringworld_workers.data.tokenizer import (
    SentencePieceTokenizer,
    TextTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from ringworld_workers.evaluate.cities import EVALUATED, TRAINED, draw_cities, draw_numbers
from ringworld_workers.evaluate.haystack import Haystacks
from ringworld_workers.evaluate.needle_documents import find_tokenizer, make_documents
from ringworld_workers.evaluate.needle_prompt import Needle, Wording

TEXT = "The boat went out at dawn.  It came\nback late! Why?\n\nNobody knew, not even Mr. Hale. "
SPEECHES = HaystackSpec()


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    for number in range(3):
        (folder / f"{number}.txt").write_text(TEXT * 40 + f"This was book {number}.")
    return folder


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    if request.param == "bytes":
        return find_tokenizer("bytes")
    if request.param == "bpe":
        return train_tokenizer([TEXT * 3, "What is the special magic number? "], 300)
    folder = tmp_path_factory.mktemp("sp")
    text = folder / "text.txt"
    text.write_text((TEXT + "What is the special magic Oslo number? ASSISTANT: 0123456789\n") * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(folder / "tokenizer.model")


def _haystacks(books: Path, tokenizer: TextTokenizer, repeat: bool = False) -> Haystacks:
    return Haystacks(HaystackSpec(files=["*.txt"], repeat=repeat), books, tokenizer)


def test_a_haystack_has_exactly_the_tokens_and_comes_again(
    books: Path, tokenizer: TextTokenizer
) -> None:
    haystacks = _haystacks(books, tokenizer)
    one, again = haystacks.draw(700, "a"), haystacks.draw(700, "a")
    assert len(one.tokens) == 700 and one.ends[0] == 0 and one.ends[-1] == 700
    assert np.array_equal(one.tokens, again.tokens) and one.texts == again.texts
    assert any(not np.array_equal(one.tokens, haystacks.draw(700, seed).tokens) for seed in "bcdef")


def test_needles_stand_at_sentence_ends_and_prompts_are_exact(
    books: Path, tokenizer: TextTokenizer
) -> None:
    haystack = _haystacks(books, tokenizer).draw(900, "a")
    wording = Wording(NeedleFormat(), tokenizer)
    question = wording.format.question_of(["Oslo"], of_many=False)
    for length in (400, 401, 512):
        for depth in (0, 33, 50, 100):
            needle = Needle("Oslo", "1234567", depth)
            made = wording.prompt(haystack, [needle], question, length)
            assert len(made.tokens) == length
            said = tokenizer.decode(made.tokens.tolist())
            before, _, after = said.partition("The special magic Oslo number is: 1234567")
            assert after.endswith(f"{question} ASSISTANT:")
            assert made.depths[0] <= depth
            if depth == 0:
                assert before.strip() == "You are a helpful assistant. USER:"
            elif depth < 100:
                assert before.rstrip()[-1] in ".!?"
            else:
                assert made.depths == (100.0,)


def _tokens(parts: tuple[Part, ...], tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of each part, as the build makes them."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    return [
        tokenizer.encode(part.spelled(tokenizer.marks_words))
        if isinstance(part, TextPart)
        else [ids[part.token]]  # type: ignore[union-attr]
        for part in parts
    ]


def test_a_model_is_asked_in_the_tokens_that_it_was_trained_on(
    books: Path, tokenizer: TextTokenizer
) -> None:
    haystack = _haystacks(books, tokenizer).draw(900, "a")
    wording = Wording(NeedleFormat(), tokenizer)
    question = wording.format.question_of(["Oslo"], of_many=False)
    for depth in (0, 40, 100):
        made = wording.prompt(haystack, [Needle("Oslo", "1234567", depth)], question, 500)
        tail = wording.tail(question)
        context = tokenizer.decode([*made.tokens[len(wording.head) : -len(tail)].tolist()])
        turns = [Turn("user", (f"{context} {question}".strip(),)), Turn("assistant", ("1234567",))]
        trained = _tokens(ChatTemplate().parts(turns), tokenizer)
        assert [*trained[0], *trained[1]] == made.tokens.tolist()


def test_training_documents_keep_their_length_and_the_evaluations_secrets(
    books: Path, tokenizer: TextTokenizer
) -> None:
    spec = NeedleDocumentsSpec(
        documents=12,
        tokens=1_400,
        needles=3,
        questions=2,
        asked_as="both",
        haystack=HaystackSpec(files=["*.txt"]),
    )
    made = list(make_documents(spec, books, tokenizer))
    assert made == list(make_documents(spec, books, tokenizer))
    for document in made:
        said = document.messages()["messages"]
        turns = [Turn(one["role"], (one["content"].strip(),)) for one in said]
        tokens = sum(map(len, _tokens(ChatTemplate().parts(turns), tokenizer)))
        assert 0.93 * spec.tokens < tokens <= document.tokens == spec.tokens
        assert not any(f" {city} number" in document.context for city in EVALUATED)
        for question, answer in document.turns:
            city = next(line for line in document.context.splitlines() if answer in line).split()[3]
            assert city in question and int(answer) % 7
        chat = json.loads(json.dumps(document.messages()))
        assert [turn["role"] for turn in chat["messages"]] == ["user", "assistant"] * 2


def test_needles_of_short_documents_stand_at_either_end_and_between(
    books: Path, tokenizer: TextTokenizer
) -> None:
    haystack = HaystackSpec(files=["*.txt"])
    spec = NeedleDocumentsSpec(documents=60, tokens=400, needles=1, questions=1, haystack=haystack)
    contexts = [document.context for document in make_documents(spec, books, tokenizer)]
    first = sum(context.startswith("The special magic") for context in contexts)
    last = sum(context.rstrip()[-7:].isdigit() for context in contexts)
    assert first and last and first + last < 60


def test_plain_documents_are_lines_in_lwms_form(books: Path) -> None:
    spec = NeedleDocumentsSpec(
        documents=1,
        tokens=600,
        needles=2,
        questions=2,
        haystack=HaystackSpec(files=["*.txt"]),
        format=NeedleFormat(template="plain"),
    )
    (made,) = make_documents(spec, books, find_tokenizer("bytes"))
    record = made.fields(marks_words=False)
    assert record["fields"] == "[question0],answer0,[question1],answer1"
    whole = "".join(record[key.strip("[]")] for key in record["fields"].split(","))
    assert len(whole.encode()) + 2 <= 600
    assert record["question1"].startswith(" The special magic ")
    assert record["question1"].endswith(" number is:") and record["answer1"].startswith(" ")


def test_cities_and_numbers_are_disjoint() -> None:
    assert not set(EVALUATED) & set(TRAINED)
    assert len(set(EVALUATED)) == len(EVALUATED) >= 100
    draw = random.Random(0)
    made_up = draw_cities(draw, 20_000, made_up=1.0)
    assert not {name.lower() for name in made_up} & {name.lower() for name in EVALUATED}
    assert {len(name) for name in made_up} == set(range(3, 13))
    # A model writes only what it was asked to write: no two letters of a city are new to it.
    asked = set().union(*(pairwise(name.lower()) for name in made_up))
    assert not set().union(*(pairwise(name.lower()) for name in EVALUATED)) - asked
    for digits in (4, 7):
        asked = draw_numbers(draw, 40, digits, evaluated=True)
        trained = draw_numbers(draw, 400, digits, evaluated=False)
        assert not set(asked) & set(trained) and {len(number) for number in asked} == {digits}
    with pytest.raises(ValueError, match="117 needles of different cities, and there are 116"):
        draw_cities(draw, 117)


def test_too_little_text_names_the_remedy(books: Path) -> None:
    tokenizer = find_tokenizer("bytes")
    with pytest.raises(DataError, match=r"40,000 are needed; name more text, or set .*repeat"):
        _haystacks(books, tokenizer).draw(40_000, "a")
    assert len(_haystacks(books, tokenizer, repeat=True).draw(40_000, "a").tokens) == 40_000
    with pytest.raises(DataError, match=r"haystack.files: '\*.md' matches no file"):
        Haystacks(HaystackSpec(files=["*.md"]), books, tokenizer)


def test_the_packaged_haystack_is_long() -> None:
    tokenizer = find_tokenizer("bytes")
    assert len(Haystacks(SPEECHES, Path(), tokenizer).draw(1 << 16, "a").tokens) == 1 << 16


def test_words_without_their_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"holds no \{number\}"):
        NeedleFormat(needle="The number of {city} is unknown.")


def test_a_byte_tokenizer_is_kept_as_any(tmp_path: Path) -> None:
    made = find_tokenizer("bytes")
    made.save(tmp_path)
    assert load_tokenizer(tmp_path).digest() == made.digest() and made.size == 258
