"""Questions with known answers, from jsonl in one's own, LOFT's or Video-MME's shape."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ringworld_jobs.evaluate_questions import QuestionsTask
from ringworld_workers.data.draft import Refused, WorkItem
from ringworld_workers.data.files import DataError, InputFile, resolve
from ringworld_workers.data.json_lines import kind
from ringworld_workers.data.records import Record, records, require_text

Kind = Literal["answer", "retrieve", "choose"]
"""Whether a text, ids of passages, or a letter is expected."""
INSTRUCTIONS: dict[Kind, str] = {
    "answer": "Answer in a few words, and with nothing else.",
    "retrieve": "Answer with the IDs of the documents that hold the answer, and with nothing else.",
    "choose": "Respond with only the letter of the correct option.",
}
"""What follows a question that the settings give no instruction for."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        id: unlike any other's.
        place: its file and line.
        kind: what is expected.
        text: the question, with its options.
        expected: texts of which one is right, ids that are all wanted, or the right letter.
        context: text that is given before it; empty: none, or the corpus.
        video: file that is shown.
        options: how many there are.
        passages: ids of the corpus that it cannot do without.
        group: what its score is also counted under, such as ``long``; empty: nothing.
    """

    id: str
    place: str
    kind: Kind
    text: str
    expected: tuple[str, ...]
    context: str = ""
    video: Path | None = None
    options: int = 0
    passages: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """One text of a corpus."""

    id: str
    title: str
    text: str

    def spelled(self) -> str:
        """As a prompt shows it, a line of its own."""
        title = f" {self.title}." if self.title else ""
        return f"\n[{self.id}]{title} {' '.join(self.text.split())}"


@dataclass
class _Reader:
    settings: QuestionsTask
    seen: dict[str, str] = field(default_factory=dict)

    def question(self, record: Record) -> Question:
        value, form = record.value, self.settings.form
        if form == "auto":
            form = "video_mme" if "options" in value else "plain"
            form = "loft" if "query_text" in value else form
        made = getattr(self, f"_{form}")(record)
        if made.id in self.seen:
            raise ValueError(
                f"id {made.id!r} is that of {self.seen[made.id]}, too; give each its own"
            )
        self.seen[made.id] = record.name
        return made

    def _plain(self, record: Record) -> Question:
        value = record.value
        answers = value.get("answers", value.get("answer"))
        expected = [answers] if isinstance(answers, str) else _list("answers", answers)
        context, video = value.get("context", ""), value.get("video")
        return Question(
            str(value.get("id", record.name)),
            record.name,
            "answer",
            require_text("question", value.get("question")).strip(),
            tuple(require_text(f"answers[{at}]", one) for at, one in enumerate(expected)),
            require_text("context", context).strip(),
            None if video is None else self._video(require_text("video", video)),
        )

    def _loft(self, record: Record) -> Question:
        value = record.value
        answers = _list("answers", value.get("answers"))
        retrieve = all(isinstance(one, list) for one in answers)
        expected = [one[0] if isinstance(one, list) and one else one for one in answers]
        texts = tuple(require_text(f"answers[{at}]", one) for at, one in enumerate(expected))
        metadata = value.get("metadata")
        wanted = metadata.get("qrels", []) if isinstance(metadata, dict) else []
        named = tuple(str(one[0]) for one in wanted if isinstance(one, list) and one)
        return Question(
            require_text("qid", value.get("qid")),
            record.name,
            "retrieve" if retrieve else "answer",
            require_text("query_text", value.get("query_text")).strip(),
            texts,
            passages=texts if retrieve else named,
        )

    def _video_mme(self, record: Record) -> Question:
        value = record.value
        options = [
            require_text(f"options[{at}]", one).strip()
            for at, one in enumerate(_list("options", value.get("options")))
        ]
        if len(options) > len(string.ascii_uppercase):
            raise ValueError(f"{len(options)} options; letters name 26 at most")
        letters = string.ascii_uppercase[: len(options)]
        answer = require_text("answer", value.get("answer")).strip().upper()
        if len(answer) != 1 or answer not in letters:
            raise ValueError(f"answer {answer!r} is none of its options' letters, {letters}")
        lettered = [
            option if option.startswith(f"{letter}.") else f"{letter}. {option}"
            for letter, option in zip(letters, options, strict=True)
        ]
        name = value.get("videoID", value.get("video"))
        asked = require_text("question", value.get("question")).strip()
        return Question(
            str(value.get("question_id", record.name)),
            record.name,
            "choose",
            "\n".join((asked, *lettered)),
            (answer,),
            video=self._video(require_text("videoID", name)),
            options=len(options),
            group=str(value.get("duration", "")),
        )

    def _video(self, name: str) -> Path:
        """A file below ``media_root``, its ending left out or not."""
        root = Path(self.settings.media_root).resolve()
        path = root / name
        # A record may come from anywhere; it does not choose what else of the machine is read.
        if not name or "\0" in name or not path.resolve().is_relative_to(root):
            raise ValueError(f"video {name!r} lies outside media_root; give a path in it")
        if path.is_file():
            return path
        found = sorted(path.parent.glob(f"{_escaped(path.name)}.*")) if path.parent.is_dir() else []
        if not found:
            raise ValueError(f"video {name!r} is no file in media_root; correct one of them")
        return found[0]


def read_questions(settings: QuestionsTask) -> list[Question]:
    """All questions, in the order of the files and lines.

    Raises:
        DataError: no file matches, or a line is no question; says which and why.
    """
    reader = _Reader(settings)
    found = []
    for record in _all_records("files", settings.files):
        try:
            found.append(reader.question(record))
        except ValueError as error:
            raise DataError(f"evaluate.questions: {record.name}: {error}") from error
    if not found:
        raise DataError("evaluate.questions.files hold no question")
    return found


def read_corpus(pattern: str) -> list[Passage]:
    """The passages of a corpus, in order.

    Raises:
        DataError: no file matches, or a line is no passage.
    """
    found = []
    for record in _all_records("corpus", [pattern]):
        value = record.value
        try:
            found.append(
                Passage(
                    require_text("pid", value.get("pid")),
                    require_text("title_text", value.get("title_text", "")).strip(),
                    require_text("passage_text", value.get("passage_text")).strip(),
                )
            )
        except ValueError as error:
            raise DataError(f"evaluate.questions.corpus: {record.name}: {error}") from error
    return found


def _all_records(what: str, patterns: Sequence[str]) -> Iterator[Record]:
    files: dict[str, InputFile] = {}
    for pattern in patterns:
        try:
            files.update((str(file.path), file) for file in resolve(pattern, Path()))
        except DataError as error:
            raise DataError(f"evaluate.questions.{what}: {error}") from error
    for number, name in enumerate(sorted(files)):
        # A file by its name, not its place: records are compared between machines.
        file = InputFile(files[name].path, files[name].path.name)
        for record in records(WorkItem("questions", number, file)):
            if isinstance(record, Refused):
                raise DataError(f"evaluate.questions.{what}: {record.name}: {record.reason}")
            yield record


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else kind(value)
        raise ValueError(f"{key} holds {found}, expected a list of one at least")
    return value


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
