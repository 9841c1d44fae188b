"""Needles as a dataset of a recipe: the examples that a model learns retrieval from."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringworld_jobs.load import load_recipe
from ringworld_jobs.problem import JobSpecError
from ringworld_workers.data.files import DataError
from ringworld_workers.data.prepare import Prepared, build
from ringworld_workers.data.shards import Dataset
from ringworld_workers.data.tokenizer import load_tokenizer, train_tokenizer

RECIPE = """
kind: data
name: needles
tokenizer: {train: {vocabulary_size: 300, split_digits: true}}
datasets:
  found:
    kind: needles
    make:
      documents: 70
      tokens: 400
      needles: 3
      questions: 2
      haystack: {files: ["*.txt"], repeat: true}
      format:
        needle: " {city} has {number}."
        question: "{city}?"
        instruction: ""
        answer: "{city} has {number}."
        system: ""
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name, word in (("a.txt", "hay"), ("b.txt", "straw")):
        text = " ".join(f"There is {word} of sort {n} in barn {n * 7 % 40}." for n in range(200))
        (tmp_path / name).write_text(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def found(built: Prepared) -> Dataset:
    return Dataset(built.datasets["found"], "train")


def test_each_question_is_answered_by_its_needle_and_answers_alone_carry_loss(recipe: Path) -> None:
    built = build(recipe, recipe.parent / "cache")
    tokenizer, dataset = load_tokenizer(built.dir), found(built)
    assert len(dataset) == 70
    texts = set()
    for number in range(len(dataset)):
        example = dataset.read(number)
        text = tokenizer.decode(example.tokens.tolist())
        texts.add(text)
        assert 200 < len(example.tokens) <= 400
        answers = [part for part in text.split("ASSISTANT:")[1:]]
        learned = tokenizer.decode(example.tokens[example.loss_mask > 0].tolist())
        assert len(answers) == 2
        for answer in answers:
            said = answer.split("USER:")[0].strip()
            city, value = said.removesuffix(".").split(" has ")
            assert text.count(f"{city} has {value}.") == 2, "once hidden, once answered"
            assert f"{city}?" in text and said in learned
        assert "barn" not in learned and "?" not in learned
    assert len(texts) == 70, "no two documents are alike"


def test_the_tokenizer_learns_what_is_hidden_and_asked(recipe: Path) -> None:
    wider = RECIPE.replace("vocabulary_size: 300", "vocabulary_size: 400")
    words = "{city} keeps beneath {number}"
    recipe.write_text(
        wider.replace("{city} has {number}", words) + "        user_prefix: 'QUESTIONER:'\n"
    )
    tokenizer = load_tokenizer(build(recipe, recipe.parent / "cache").dir)
    for words in ("QUESTIONER", " ASSISTANT", " keeps", " beneath"):
        assert len(tokenizer.encode(words)) <= 2, words


def test_the_same_documents_however_the_work_is_cut(recipe: Path) -> None:
    """Each depends on the seed and its own number alone."""
    first = build(recipe, recipe.parent / "one")
    recipe.write_text(RECIPE.replace("documents: 70", "documents: 66"))
    second = build(recipe, recipe.parent / "two")
    whole, less = found(first), found(second)
    for number in range(66):
        assert whole.read(number).tokens.tolist() == less.read(number).tokens.tolist()


def test_a_haystack_that_is_not_there_is_said(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("*.txt", "*.none"))
    with pytest.raises(DataError, match=r"haystack.files.*\*\.none"):
        build(recipe, recipe.parent / "cache")


def test_needles_that_leave_no_room_are_said(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("tokens: 400", "tokens: 90"))
    phases: list[str] = []
    with pytest.raises(DataError, match=r"datasets.found.make: .*raise the length"):
        build(recipe, recipe.parent / "cache", lambda phase, done, total: phases.append(phase))
    assert "train tokenizer" in phases and "read and tokenize" not in phases, "said at once"
    recipe.write_text(RECIPE.replace("tokens: 400", "tokens: 9"))
    with pytest.raises(JobSpecError, match="found.make.* tokens 9 is below 10,.*raise it"):
        load_recipe(recipe)


def test_plain_words_are_refused_with_the_way_that_takes_them(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("format:", "format:\n        template: plain"))
    with pytest.raises(JobSpecError, match="ringworld data needles"):
        load_recipe(recipe)


def test_split_digits_makes_numbers_of_single_digits() -> None:
    texts = ["In 1999 and 1999 and 2019 there were 1999 of them. " * 20]
    joined, apart = (train_tokenizer(texts, 270, split_digits=split) for split in (False, True))
    assert len(joined.encode(" 1999")) < 5 == len(apart.encode(" 1999"))
    assert apart.decode(apart.encode("in 1999, 20 of 3")) == "in 1999, 20 of 3"
