"""Prompts of one's own: the same answers on any ring and after any stop, and files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asked_model
import av
import numpy as np
import pytest
from asked_folder import CONTEXT_LENGTH, write_folder
from PIL import Image

from ringworld_jobs.evaluate_generate import GenerateTask
from ringworld_jobs.evaluate_spec import EvaluateSpec
from ringworld_platform.model_places import find_model
from ringworld_workers.evaluate import own_prompts
from ringworld_workers.evaluate.job import EvaluationJob
from ringworld_workers.evaluate.own_prompts import OwnPrompts, request_of
from ringworld_workers.evaluate.run import run_evaluation
from ringworld_workers.evaluate.task import Record, Subject
from ringworld_workers.generation.loading import load_model
from ringworld_workers.generation.media_files import write_video
from ringworld_workers.generation.source import RequestError
from ringworld_workers.mesh import build_mesh

SETTINGS = {"text": {"temperature": 0.8}, "answer_tokens": 8, "answer_frames": 0, "batch": 2}


@dataclass
class Told:
    """A reporter that keeps answers, and asks to stop once it has so many."""

    stop_after: int | None = None
    answers: list[Record] = field(default_factory=list)

    def phase(self, name: str, step: int, ring: Any = None) -> None:
        pass

    def answer(self, record: Record) -> None:
        self.answers.append(json.loads(json.dumps(record)))

    def event(self, record: Record) -> None:
        pass

    def should_stop(self) -> bool:
        return self.stop_after is not None and len(self.answers) >= self.stop_after


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media, and prompts: in text, on media, one that is too long, and one on a broken video."""
    folder = tmp_path_factory.mktemp("prompts")
    Image.new("RGB", (16, 24), "red").save(folder / "red.png")
    write_video(np.full((8, 16, 16, 3), 90, np.uint8), folder / "film.mp4", 4)
    (folder / "broken.mp4").write_bytes(b"no film" * 50)
    lines = [
        {"prompt": "Once upon a time"},
        {"id": "red", "prompt": "What?", "image": "red.png"},
        {"id": "broken", "prompt": "And?", "video": "broken.mp4"},
        {"prompt": "{video} so?", "video": "film.mp4"},
        {"prompt": "x" * (CONTEXT_LENGTH + 1)},
        {"prompt": "The end"},
        {"prompt": "The very end"},
    ]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def job(folder: Path) -> EvaluationJob:
    source = find_model(str(write_folder(folder / "tiny")), Path("no-runs"))
    return EvaluationJob(
        run_id="asked-1",
        attempt=1,
        world_size=1,
        sequence_parallel_size=1,
        data_parallel_size=1,
        device="cpu",
        precision="fp32",
        stage_name="asked",
        stage_index=0,
        step=0,
        global_step=0,
        model=source,
        evaluations=EvaluateSpec(
            generate=GenerateTask(prompts=str(folder / "asked.jsonl"), **SETTINGS)  # type: ignore[arg-type]
        ),
        seed=5,
        context_length=CONTEXT_LENGTH,
        files_url=f"file://{folder}/whole",
    )


def _ask(
    rank: int, size: int, job: EvaluationJob, stop_after: int | None
) -> tuple[dict[str, Any], list[Record]]:
    told = Told(stop_after)
    mesh = build_mesh(job.sequence_parallel_size, job.data_parallel_size)
    result = run_evaluation(job, mesh, told)  # type: ignore[arg-type]
    return result, told.answers


def _ask_both(
    rank: int, size: int, job: EvaluationJob, films: EvaluationJob
) -> tuple[dict[str, Any], list[Record]]:
    _, texts = _ask(rank, size, job, None)
    result, drawn = _ask(rank, size, films, None)
    return result, texts + drawn


def _films(folder: Path) -> EvaluateSpec:
    prompts = folder / "films.jsonl"
    prompts.write_text('{"prompt": "grey"}\n{"id": "on", "prompt": "on", "from": "film.mp4"}\n')
    return EvaluateSpec(
        generate=GenerateTask(prompts=str(prompts), to="video", frames=3, fps=2, guidance=2)
    )


def _alone(job: EvaluationJob) -> tuple[OwnPrompts, list[Record]]:
    """The task of a job, and its records, with no ring and in one batch."""
    loaded = load_model(job.model)
    subject = Subject(
        loaded=loaded,
        stage_name=job.stage_name,
        seed=job.seed,
        context_length=job.context_length,
        files_url=job.files_url,
    )
    settings = job.evaluations.generate
    assert settings is not None
    task = OwnPrompts(settings.model_copy(update={"batch": 7}), subject)
    facts = {item.id: item.facts for item in task.items()}
    return task, [{**facts[a["id"]], **a} for a in asked_model.answers(task, subject)]


def _plain(answers: list[Record], keys: Collection[str]) -> dict[str, Record]:
    """By id, without what says when and by whom an answer was given."""
    return {a["id"]: {key: a[key] for key in keys if key in a} for a in answers}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_mesh_answers_alike_and_a_stop_loses_nothing(
    run_gang: Callable[..., list[Any]], job: EvaluationJob, folder: Path
) -> None:
    task, answers = _alone(job)
    keys = {key for answer in answers for key in answer}
    whole, figures = _plain(answers, keys), task.summarize(answers)
    assert (figures["answered"], figures["failed"]) == (5, 2)
    assert figures["tokens"] == sum(answer.get("tokens", 0) for answer in answers) > 5
    by_id = {answer["prompt_id"]: answer for answer in answers}
    assert "broken.mp4: cannot be decoded" in by_id["broken"]["problem"]
    assert f"was trained for {CONTEXT_LENGTH}" in by_id["5"]["problem"]
    assert by_id["1"]["answer"] != by_id["6"]["answer"]

    both = replace(job, world_size=2, sequence_parallel_size=2, files_url=f"file://{folder}/both")
    films = replace(both, evaluations=_films(folder))
    (_, first), (_, second) = run_gang(_ask_both, 2, both, films)
    _, drawn = _alone(replace(films, files_url=f"file://{folder}/alone"))
    assert _plain(first, keys) == {**whole, **_plain(drawn, keys)} and second == []
    assert _files(folder / "both") == _files(folder / "alone")

    # Two rings, stopped after some answers, and begun anew without the items that have one.
    rings = replace(job, world_size=2, data_parallel_size=2, files_url=f"file://{folder}/rings")
    stopped = run_gang(_ask, 2, rings, 1)
    given = [answer for _, mine in stopped for answer in mine]
    assert stopped[0][0] == {"status": "stopped", "kept": len(given)} and 0 < len(given) < 7
    again = run_gang(_ask, 2, replace(rings, answers=tuple(given), attempt=2), None)
    new = [answer for _, mine in again for answer in mine]
    assert len(new) == 7 - len(given) and _plain(given + new, keys) == whole
    assert again[0][0]["evaluations"][0]["figures"] == figures


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return replace(asked_model.make_subject(), files_url=f"file://{folder}/drawn")


def test_videos_and_images_are_files_beside_the_answers(subject: Subject, folder: Path) -> None:
    settings = _films(folder).generate
    assert settings is not None
    answers = asked_model.answers(OwnPrompts(settings, subject), subject)
    assert [answer["files"] for answer in answers] == [["00001.mp4"], ["00002.mp4"]]
    # Two frames of the two seconds that are given, and three more.
    for name, frames in (("00001.mp4", 3), ("00002.mp4", 3 + 4)):
        with av.open(str(folder / "drawn" / name)) as container:
            stream = container.streams.video[0]
            assert (sum(1 for _ in container.decode(stream)), stream.average_rate) == (frames, 2)
    prompts = folder / "images.jsonl"
    prompts.write_text('{"prompt": "red"}\n')
    task = OwnPrompts(GenerateTask(prompts=str(prompts), to="image"), subject)
    (answer,) = asked_model.answers(task, subject)
    assert answer["files"] == ["00001.png"] and answer["answer"] == ""
    assert Image.open(folder / "drawn" / "00001.png").size == (8, 8)
    assert task.summarize([answer])["drawn"] == 1


def test_a_long_answer_is_a_file_too(
    subject: Subject, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_prompts, "LONGEST_TEXT_BYTES", 10)
    prompts = folder / "long.jsonl"
    prompts.write_text('{"prompt": "Tell"}\n')
    settings = GenerateTask(prompts=str(prompts), answer_tokens=40, answer_frames=0)
    (answer,) = asked_model.answers(OwnPrompts(settings, subject), subject)
    assert answer["files"] == ["00001.txt"]
    assert (folder / "drawn" / "00001.txt").read_text("utf-8") == answer["answer"]


def test_a_line_that_was_changed_is_another_question(subject: Subject, folder: Path) -> None:
    prompts = folder / "changing.jsonl"
    ids = []
    for text in ("one", "another", "one"):
        prompts.write_text(json.dumps({"id": "a", "prompt": text}))
        (item,) = OwnPrompts(GenerateTask(prompts=str(prompts)), subject).items()
        assert item.facts["prompt_id"] == "a" and item.facts["prompt"] == text
        ids.append(item.id)
    assert ids[0] == ids[2] != ids[1]


def test_a_model_without_a_codebook_draws_nothing(subject: Subject, folder: Path) -> None:
    blind = replace(subject, loaded=replace(subject.loaded, codebook=None))
    settings = GenerateTask(prompts=str(folder / "asked.jsonl"), to="video")
    with pytest.raises(RequestError, match="to: video needs the codebook"):
        OwnPrompts(settings, blind)


def test_what_is_not_said_is_as_on_the_command_line() -> None:
    image = request_of(GenerateTask(prompts="x", to="image"), 3).settings
    assert (image.guidance_scale, image.vision.top_k, image.seed) == (5.0, 1000, 3)
    video = request_of(GenerateTask(prompts="x", to="video"), 0).settings
    assert (video.guidance_scale, video.vision.top_k) == (1.0, 100)
    text = request_of(GenerateTask(prompts="x"), 0).settings
    assert (text.text.temperature, text.max_new_tokens) == (0.0, 256)
