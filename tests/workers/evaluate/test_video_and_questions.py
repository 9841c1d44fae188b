"""Video needles, questions of one's own and reconstruction, on a tiny model and codebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asked_model import answers, make_subject
from PIL import Image

from ringworld_jobs.evaluate_needles import VideoNeedleTask
from ringworld_jobs.evaluate_questions import QuestionsTask, ReconstructionTask
from ringworld_model.batch import VISION
from ringworld_model.tokens import frames_of
from ringworld_workers.data.files import DataError
from ringworld_workers.evaluate.question_records import Question, read_questions
from ringworld_workers.evaluate.questions import Questions, score
from ringworld_workers.evaluate.reconstruction import Reconstruction
from ringworld_workers.evaluate.task import Item
from ringworld_workers.evaluate.video_needle import COLOURS, VideoNeedle, grey_patterns

VIDEO = VideoNeedleTask(frames=[6, 20], depths=3, answer_tokens=4, marked=3)


# --- marked frames ---


def test_marked_frames_stand_where_the_question_asks() -> None:
    subject = make_subject()
    task = VideoNeedle(VIDEO, subject)
    items = task.items()
    assert len(items) == 2 * 3 * 2 and items == VideoNeedle(VIDEO, subject).items()
    codebook = subject.loaded.codebook
    assert codebook is not None
    for item in items:
        prompt = task._prompt(item)
        codes = frames_of(prompt.ids(VISION), 4, codebook.codebook_size)
        assert len(codes) == item.facts["frames"]
        shown = codebook.decode(codes)
        grey = np.ptp(shown.astype(int), axis=-1).max(axis=(1, 2)) == 0
        for colour, position in item.facts["marked"].items():
            # The tiny codebook knows the colour cube's corners and greys alone.
            if colour in ("red", "green", "blue", "yellow"):
                assert not grey[position - 1]
                pixel = shown[position - 1].mean(axis=(0, 1))
                assert np.abs(pixel - COLOURS[colour]).max() < 90
        assert len(item.facts["marked"]) == 3
        colour, position = next(iter(item.facts["marked"].items()))
        wanted = colour if item.facts["ask"] == "colour" else str(position)
        assert item.facts["expected"] == wanted
        assert position == 1 + round(item.facts["depth"] / 100 * (item.facts["frames"] - 1))
    records = answers(task, subject)
    assert [record["id"] for record in records] == [item.id for item in items]
    whole = [{**item.facts, **record} for item, record in zip(items, records, strict=True)]
    figures = task.summarize(whole)
    assert list(figures)[0] == "accuracy" and "accuracy_at_20_frames" in figures
    json.dumps(whole)


def test_clips_that_the_context_cannot_hold_are_refused() -> None:
    subject = make_subject()
    (longest,) = VideoNeedle(
        VIDEO.model_copy(update={"frames": "auto", "depths": 1}), subject
    )._frames[-1:]
    assert VideoNeedle(VIDEO.model_copy(update={"frames": [longest]}), subject)
    with pytest.raises(ValueError, match=rf"frames: {longest + 1} frames; give 3 .* to {longest}"):
        VideoNeedle(VIDEO.model_copy(update={"frames": [longest + 1]}), subject)
    with pytest.raises(ValueError, match="100 tokens of context hold 0 frames"):
        VideoNeedle(VIDEO, make_subject(context_length=100))


def test_grey_patterns_move_and_have_no_colour() -> None:
    made = grey_patterns(5, 16, seed=1)
    assert made.shape == (5, 16, 16, 3) and np.ptp(made.astype(int), axis=-1).max() == 0
    assert all(
        np.abs(one.astype(int) - other).mean() > 2
        for one, other in zip(made, made[1:], strict=False)
    )


# --- questions ---


def _write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def loft(tmp_path: Path) -> QuestionsTask:
    passages = [
        {"pid": f"doc{n}", "title_text": f"Title {n}", "passage_text": f"Fact {n} is here. " * 3}
        for n in range(40)
    ]
    _write(tmp_path / "corpus.jsonl", passages)
    asked = [
        {"qid": "q1", "query_text": "which is the third", "answers": [["doc31", 1], ["doc2", 1]]},
        {
            "qid": "q2",
            "query_text": "what is fact 9",
            "answers": ["here", "there"],
            "metadata": {"qrels": [["doc39", 1]]},
        },
    ]
    _write(tmp_path / "queries.jsonl", asked)
    return QuestionsTask(files=["queries.jsonl"], corpus="corpus.jsonl", answer_tokens=4).absolute(
        tmp_path
    )


def test_lofts_shape_gives_as_much_of_the_corpus_as_fits(loft: QuestionsTask) -> None:
    subject = make_subject()
    task = Questions(loft, subject)
    items = task.items()
    assert [item.facts["kind"] for item in items] == ["retrieve", "answer"]
    questions = list(task._questions.values())
    said = [
        subject.loaded.tokenizer.decode(task._prompt(question).tokens.tolist())
        for question in questions
    ]
    for text in said:
        assert all(f"\n[{name}] Title" in text for name in ("doc2", "doc31", "doc39"))
        assert "doc30]" not in text and 800 < len(text.encode()) <= 1024 - 4
        assert text.index("[doc2]") < text.index("[doc31]") < text.index("[doc39]")
    assert said[0].endswith(
        "which is the third Answer with the IDs of the documents that hold the answer, and with "
        "nothing else. ASSISTANT:"
    )
    records = answers(task, subject)
    assert set(task.summarize(records)) == {"recall", "exact", "f1", "contains"}


def test_a_corpus_without_the_passages_asked_for_is_refused(
    loft: QuestionsTask, tmp_path: Path
) -> None:
    _write(tmp_path / "corpus.jsonl", [{"pid": "doc2", "passage_text": "Alone."}])
    with pytest.raises(ValueError, match="2 passages that questions name are not in it"):
        answers(Questions(loft, make_subject()), make_subject())
    long = {"pid": "doc31", "passage_text": "Long. " * 300}
    _write(
        tmp_path / "corpus.jsonl",
        [{"pid": "doc2", "passage_text": "x"}, long, {**long, "pid": "doc39"}],
    )
    with pytest.raises(ValueError, match=r"exceed the context of 1,024 tokens by 2,"):
        answers(Questions(loft, make_subject()), make_subject())


def test_video_mmes_shape(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "white")]
    frames[0].save(tmp_path / "abc.gif", save_all=True, append_images=frames[1:], duration=400)
    records = [
        {
            "videoID": "abc",
            "question_id": f"001-{n}",
            "duration": "long" if n else "short",
            "question": "Which colour comes last?",
            "options": ["A. Red.", "B. Blue.", "C. White.", "Green."],
            "answer": "C",
        }
        for n in range(3)
    ]
    _write(tmp_path / "mme.jsonl", records)
    settings = QuestionsTask(files=["mme.jsonl"], frames=3, answer_tokens=4).absolute(tmp_path)
    subject = make_subject()
    task = Questions(settings, subject)
    (question, *_) = task._questions.values()
    prompt = task._prompt(question)
    assert len(prompt.ids(VISION)) == 3 * 5
    said = subject.loaded.tokenizer.decode(prompt.ids(0))
    assert "C. White.\nD. Green. Respond with only the letter of the correct option.\n" in said
    got = [
        {**item.facts, **record}
        for item, record in zip(task.items(), answers(task, subject), strict=True)
    ]
    assert set(task.summarize(got)) == {"accuracy", "accuracy_of_long", "accuracy_of_short"}
    (tmp_path / "abc.gif").write_bytes(b"GIF89a broken")
    with pytest.raises(ValueError, match="video .*abc.gif"):
        answers(Questions(settings, subject), subject)


def test_ones_own_questions_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    own = {"id": "a", "question": "Where?", "answer": "In Ghent", "context": "It was in Ghent."}
    path = _write(tmp_path / "own.jsonl", [own])
    settings = QuestionsTask(files=["own.jsonl"], answer_tokens=4).absolute(tmp_path)
    subject = make_subject()
    (record,) = answers(Questions(settings, subject), subject)
    assert record["id"] == "a" and set(record) >= {"exact", "f1", "contains", "score"}
    for broken, message in (
        ({**own, "answer": []}, "own.jsonl line 1: answers holds an empty list"),
        ({**own, "question": 3}, "question holds a number, expected text"),
        ({**own, "video": "../secret.mp4"}, "lies outside media_root"),
        ({**own, "video": "none.mp4"}, "is no file in media_root"),
        ({"options": ["x", "y"], "question": "?", "answer": "C", "videoID": "v"}, "letters, AB"),
    ):
        _write(path, [broken])
        with pytest.raises(DataError, match=message):
            read_questions(settings)
    _write(path, [own, own])
    with pytest.raises(DataError, match="id 'a' is that of own.jsonl line 1, too"):
        read_questions(settings)
    _write(path, [{**own, "context": "long " * 400}])
    with pytest.raises(ValueError, match=r"own.jsonl line 1: 2,\d+ tokens .* context of 1,024"):
        answers(Questions(settings, subject), subject)


def test_scores() -> None:
    asked = Question("a", "x", "answer", "?", ("Glenn Close", "Close"))
    assert score(asked, "Final Answer: ['Glenn Close', 'x']")["exact"] == 1
    loose = score(asked, "It was Glenn Close who played her.")
    assert loose["exact"] == 0 and loose["contains"] == 1 and 0 < loose["f1"] < 1
    found = Question("a", "x", "retrieve", "?", ("doc1", "doc22"))
    assert score(found, "['doc22', 'doc11']") == {"score": 0.5, "recall": 0.5}
    chosen = Question("a", "x", "choose", "?", ("B",), options=4)
    assert score(chosen, "B. Blue") == {"score": 1.0, "accuracy": 1.0}


# --- reconstruction ---


def test_reconstruction_is_exact_for_the_codebooks_own_colours(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "red.png")
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    first, *rest = [Image.fromarray(one) for one in noise]
    first.save(tmp_path / "noise.gif", save_all=True, append_images=rest, duration=250)
    subject = make_subject()
    settings = ReconstructionTask(files=["*.png", "*.gif"]).absolute(tmp_path)
    task = Reconstruction(settings, subject)
    assert task.items() == [Item("noise.gif"), Item("red.png")]
    noisy, red = answers(task, subject)
    assert red["score"] > 50 and red["kind"] == "image" and red["codes_used"] == 1
    assert 5 < noisy["score"] < 25 and noisy["frames"] == 3
    figures = task.summarize([noisy, red])
    assert figures["psnr"] == pytest.approx((noisy["score"] + red["score"]) / 2)
    assert figures["psnr_of_worst_file"] == noisy["score"]
