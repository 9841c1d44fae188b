"""Drafts to tokens: what one task writes, and how the assembly reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringworld_jobs.recipe import DocumentsSpec
from ringworld_model.batch import TEXT, VISION
from ringworld_model.tokens import vision_tokens
from ringworld_workers.data.draft import (
    DatasetReader,
    Draft,
    Refused,
    SpecialPart,
    TextPart,
    VisionPart,
)
from ringworld_workers.data.files import DataError, Unavailable
from ringworld_workers.data.held_out import drawn_held_out
from ringworld_workers.data.task_files import (
    Example,
    TaskReport,
    read_report,
    report_of,
    write_examples,
)
from ringworld_workers.data.tokenizer import TextTokenizer, load_tokenizer
from ringworld_workers.data.work import Task, written_whole

TOO_SHORT = "examples shorter than documents.min_tokens"
TOO_LONG = "examples of documents.max_tokens and longer"

_CHUNK_BYTES = 4 << 20
"""Drafts are tokenized together until they hold so much text and codes."""
_CHUNK_DRAFTS = 1024


@dataclass(frozen=True, slots=True)
class ExampleRules:
    """What a recipe says of a dataset's examples, whatever their kind.

    Attributes:
        seed: of the recipe.
        held_out_share: share of the documents kept for validation.
        documents: lengths that are kept.
        codebook_size: of the vision codes; 0: the dataset may hold none.
    """

    seed: int
    held_out_share: float
    documents: DocumentsSpec
    codebook_size: int


@dataclass(frozen=True, slots=True)
class WriteExamples:
    """Reads a task's items and writes their examples into a file of its own.

    Attributes:
        readers: by dataset.
        rules: by dataset.
        tokenizer: folder or file of the tokenizer; a process loads it once.
        folder: of the results.
    """

    readers: Mapping[str, DatasetReader]
    rules: Mapping[str, ExampleRules]
    tokenizer: Path
    folder: Path

    def place(self, task: Task) -> Path:
        """The task's examples; their report lies beside them."""
        return self.folder / task.dataset / f"{task.name}.arrow"

    def done(self, task: Task) -> bool:
        """Whether the result is there, perhaps from a build that was killed."""
        return report_of(self.place(task)).is_file()

    def __call__(self, task: Task) -> tuple[str, Refused | None]:
        """Do a task.

        Returns:
            The dataset, and the task's first refusal.
        """
        if self.done(task):  # by a worker that was lost before it could say so
            return task.dataset, next(iter(read_report(self.place(task)).refused), None)
        reader, rules = self.readers[task.dataset], self.rules[task.dataset]
        encoder = Encoder(_loaded(self.tokenizer), rules)
        report = TaskReport()
        place = self.place(task)
        place.parent.mkdir(parents=True, exist_ok=True)
        drafts = chain.from_iterable(_drafts(reader, item) for item in task.items)
        with written_whole(place) as path:
            write_examples(path, encoder.examples(drafts, report))
        # Last, for it says that the task is done.
        with written_whole(report_of(place)) as path:
            path.write_bytes(report.to_bytes())
        return task.dataset, next(iter(report.refused), None)


@lru_cache(maxsize=1)
def _loaded(path: Path) -> TextTokenizer:
    return load_tokenizer(path)


def _drafts(reader: DatasetReader, item: Any) -> Iterator[Draft | Refused]:
    try:
        yield from reader.drafts(item)
    except Unavailable:
        raise
    except DataError as error:
        yield Refused(item.file.label, str(error).removeprefix(f"{item.file.path}: "))


class Encoder:
    """Tokenizes drafts, many texts at once, and keeps those that the rules keep."""

    def __init__(self, tokenizer: TextTokenizer, rules: ExampleRules) -> None:
        """Take a tokenizer and the rules of a dataset."""
        self._tokenizer, self._rules = tokenizer, rules
        self._special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}

    def examples(self, drafts: Iterable[Draft | Refused], report: TaskReport) -> Iterator[Example]:
        """Examples in the drafts' order; what is left out goes to the report."""
        for chunk in _chunks(drafts, report):
            ids = self._ids(chunk)
            for draft in chunk:
                try:
                    example = self._example(draft, ids)
                except ValueError as error:
                    report.note(Refused(draft.name, str(error)))
                    continue
                documents = self._rules.documents
                if documents.keeps(len(example.tokens)):
                    report.examples += 1
                    yield example
                else:
                    least = documents.min_tokens or 0
                    report.leave_out(TOO_SHORT if len(example.tokens) < least else TOO_LONG)

    def _ids(self, chunk: list[Draft]) -> dict[str, npt.NDArray[np.int32]]:
        """Ids of each distinct text of a chunk."""
        texts = list(dict.fromkeys(self._text(p) for d in chunk for p in d.parts if _is_text(p)))
        encoded = self._tokenizer.encode_batch(texts)
        return {text: np.asarray(ids, np.int32) for text, ids in zip(texts, encoded, strict=True)}

    def _text(self, part: Any) -> str:
        return str(part.spelled(self._tokenizer.marks_words))

    def _example(self, draft: Draft, ids: Mapping[str, npt.NDArray[np.int32]]) -> Example:
        pieces: list[npt.NDArray[np.int32]] = []
        for part in draft.parts:
            if isinstance(part, TextPart):
                pieces.append(ids[self._text(part)])
            elif isinstance(part, SpecialPart):
                pieces.append(np.array([self._special[part.token]], np.int32))
            else:
                pieces.append(self._clip(part))
        sizes = [len(piece) for piece in pieces]
        if sum(sizes) < 2:
            raise ValueError("fewer than two tokens; there is nothing to predict")
        kinds = [VISION if isinstance(part, VisionPart) else TEXT for part in draft.parts]
        held_out = draft.held_out
        if held_out is None:
            rules = self._rules
            held_out = drawn_held_out(draft.document, rules.held_out_share, rules.seed)
        return Example(
            draft.name,
            np.concatenate(pieces),
            np.repeat(np.array(kinds, np.uint8), sizes),
            np.repeat(np.array([part.loss for part in draft.parts], np.uint8), sizes),
            held_out,
        )

    def _clip(self, part: VisionPart) -> npt.NDArray[np.int32]:
        if not self._rules.codebook_size:
            raise ValueError("images and videos need a codebook; add `codebook:` to the recipe")
        return vision_tokens(part.codes, self._rules.codebook_size)


def _is_text(part: Any) -> bool:
    return isinstance(part, TextPart)


def _chunks(drafts: Iterable[Draft | Refused], report: TaskReport) -> Iterator[list[Draft]]:
    chunk: list[Draft] = []
    size = 0
    for draft in drafts:
        if isinstance(draft, Refused):
            report.note(draft)
            continue
        chunk.append(draft)
        size += sum(_size(part) for part in draft.parts)
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DRAFTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(part: Any) -> int:
    if isinstance(part, TextPart):
        return len(part.text)
    return part.codes.nbytes if isinstance(part, VisionPart) else 0
