"""Questions from a file and answers to one: lines that are wrong, kills, other settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ringworld_jobs.prompts_file import PromptsError, read_prompts
from ringworld_workers.generation.answers_file import AnswersFile
from ringworld_workers.generation.media_files import check_suffix, write_video
from ringworld_workers.generation.source import RequestError


def test_lines_of_questions(picture: Path) -> None:
    path = picture.with_name("questions.jsonl")
    path.write_text(
        '{"prompt": "Hi"}\n\n{"id": "a", "prompt": "What?", "image": "picture.png"}\n'
        '{"id": 9, "images": ["picture.png", "picture.png"]}\n'
    )
    first, second, third = read_prompts(path)
    assert (first.id, first.number, first.prompt, first.images) == ("1", 1, "Hi", ())
    assert (second.id, second.images) == ("a", (picture,))
    assert (third.id, third.number, len(third.images)) == ("9", 4, 2)
    assert len({one.digest for one in (first, second, third)}) == 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: not an object"),
        ('{"promt": "x"}', "unknown key 'promt'; did you mean 'prompt'"),
        ('{"prompt": 5}', "prompt is int, not text"),
        ('{"prompt": " "}', "it asks nothing"),
        ('{"prompt": "x", "image": "none.png"}', "image 'none.png': there is no such file"),
        ('{"prompt": "x", "videos": "a.mp4"}', "'a.mp4': there is no such file"),
        ('{"prompt": "x", "id": true}', "id=True"),
        ('{"id": 2, "prompt": "x"}\n{"prompt": "y"}', "line 2: id '2' is that of line 1"),
        ("\n", "holds no prompt"),
    ],
)
def test_lines_that_ask_nothing(line: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(PromptsError, match=why):
        read_prompts(path)
    with pytest.raises(PromptsError, match="No such file"):
        read_prompts(tmp_path / "other.jsonl")


def test_answers_go_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    settings = {"model": "tiny", "stop": ("a",)}
    one = AnswersFile(path, settings)
    one.add({"id": "1", "digest": "d", "answer": "ä"})
    one.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "2", "dig')
    again = AnswersFile(path, settings)
    assert again.done == {"1": "d"} and path.read_bytes() == whole
    again.add({"id": "2", "digest": "e"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "2"]
    with pytest.raises(RequestError, match="2 answers of other settings: model was 'tiny' and is"):
        AnswersFile(path, {**settings, "model": "other"})
    path.with_name("answers.jsonl.settings.json").unlink()
    with pytest.raises(RequestError, match="holds 2 lines, and answers.jsonl.settings.json"):
        AnswersFile(path, settings)
    for foreign in ("my notes", '{"prompt": "a"}\n{"prompt": "b"}', "[" * 9999):
        path.write_text(foreign)
        with pytest.raises(RequestError, match="line 1 is no answer of `ringworld generate`"):
            AnswersFile(path, settings)
        assert path.read_text() == foreign
    path.write_text("notes\n")
    with pytest.raises(RequestError, match="line 1 is no answer of `ringworld generate`"):
        AnswersFile(path, settings)


def test_files_of_frames(tmp_path: Path) -> None:
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    for name in ("a.gif", "a.mp4"):
        write_video(frames, tmp_path / name, 4)
        assert (tmp_path / name).stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.mp4"]
    with pytest.raises(RequestError, match=r"a.gif/b.mp4 cannot be written: (Not a|File exists)"):
        write_video(frames, tmp_path / "a.gif" / "b.mp4", 4)
    with pytest.raises(RequestError, match=r"a.avi: a video is written as .mp4, .gif"):
        check_suffix(Path("a.avi"), video=True)
