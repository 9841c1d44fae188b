"""`ringworld data needles`: a file of conversations, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ringworld_platform.cli import app


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It rained on the hill. Nobody came. The lamp was lit at six! " * 60)
    return path


def needles(folder: Path, *arguments: str) -> Result:
    to = ("--to", str(folder / "needles.jsonl"))
    return CliRunner().invoke(
        app, ["data", "needles", *to, *arguments], env={"COLUMNS": "120", "TERM": "dumb"}
    )


def test_it_writes_conversations_in_the_given_words(book: Path) -> None:
    wording = book.parent / "wording.yaml"
    wording.write_text('needle: " The code of {city} is {number}."\ninstruction: ""\ndigits: 5\n')
    result = needles(
        book.parent,
        *("--tokens", "1Ki", "--documents", "3", "--needles", "2", "--questions", "2"),
        *("--haystack", str(book), "--wording", str(wording)),
    )
    assert result.exit_code == 0, result.output
    assert "3 documents" in result.output
    lines = (book.parent / "needles.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        first, answer, second, last = json.loads(line)["messages"]
        assert first["content"].endswith(" number?") and second["content"].endswith(" number?")
        for said in (answer["content"], last["content"]):
            assert said in first["content"] and f" is {said}." in first["content"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--tokens", "1Kx"), 2, "--tokens '1Kx': cannot be read as a count"),
        (("--tokens", "512", "--questions", "9"), 2, "questions 9 is above needles 4"),
        (("--tokens", "512", "--haystack", "none.txt"), 1, "matches no file"),
        (("--tokens", "512", "--tokenizer", "none.json"), 1, "no such tokenizer file"),
        (("--tokens", "64"), 1, "the needles take"),
    ],
)
def test_what_is_wrong_is_said_once(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    result = needles(tmp_path, *arguments)
    assert result.exit_code == code and message in " ".join(result.output.split())
    assert "Traceback" not in result.output
