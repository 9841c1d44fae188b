"""Long documents with questions about their parts at the end: answers lie anywhere in them.

{system} USER: {neighbouring chunks} {question} ASSISTANT: {answer}<eos>USER: {question} ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from ringworld_jobs.recipe_text import LongQaDataset
from ringworld_workers.data.draft import Draft, Refused, WorkItem
from ringworld_workers.data.extractive import ExtractiveGenerator
from ringworld_workers.data.files import InputFile
from ringworld_workers.data.long_qa_assembly import Assembly, identity
from ringworld_workers.data.openai_generator import OpenAiGenerator
from ringworld_workers.data.qa_generator import QaGenerator
from ringworld_workers.data.records import RecordFiles
from ringworld_workers.data.text_sources import WHOLE, Document, documents, format_of
from ringworld_workers.data.text_sources import Part as PartOfFile
from ringworld_workers.data.tokenizer import TextTokenizer, load_tokenizer

_GROUP_BYTES = 256 << 10
"""Lines of a jsonl are read together until they hold so many bytes: a long document is alone."""


class LongQaReader:
    """The documents of one long-QA dataset, each some examples."""

    def __init__(
        self,
        name: str,
        dataset: LongQaDataset,
        base: Path,
        cache: Path,
        tokenizer_file: Path,
        seed: int = 0,
    ) -> None:
        """Remember what to read; nothing is read yet.

        Args:
            name: of the dataset.
            dataset: its files, lengths and generator.
            base: folder of the recipe.
            cache: folder of an endpoint's answers, shared by all workers and builds.
            tokenizer_file: what ``load_tokenizer`` takes: chunks and examples are counted in its
                tokens.
            seed: of the recipe, which draws the held-out share.
        """
        self._name, self._dataset = name, dataset
        self._cache, self._tokenizer_file = cache, tokenizer_file
        self._files = RecordFiles(name, dataset, dataset.files, base, seed)

    def items(self) -> Sequence[WorkItem]:
        """The documents: a file, a jsonl's line (short ones together), a parquet's row groups.

        Raises:
            DataError: a pattern of files or held_out matches nothing.
        """
        return self._files.items(_documents_apart)

    def training_texts(self, item: WorkItem) -> Iterator[str]:
        """The documents that are not held out."""
        for found in self._documents(item):
            if isinstance(found, Document) and not self._files.certainly_held_out(
                item.file, identity(found)
            ):
                yield found.text

    def drafts(self, item: WorkItem) -> Iterator[Draft | Refused]:
        """The examples of the item's documents.

        Raises:
            Unavailable: the generator's endpoint fails; what it answered until then is kept.
        """
        tokenizer = _tokenizer(self._tokenizer_file)
        generator = _generator(self._dataset, self._cache)
        held_out = self._files.named_held_out(item.file)
        for found in self._documents(item):
            if isinstance(found, Refused):
                yield found
                continue
            document = identity(found)
            for made in Assembly(found, self._dataset, tokenizer, generator).examples():
                if isinstance(made, Refused):
                    yield made
                else:
                    name, example = made
                    yield Draft(name, document, example, held_out)

    def _documents(self, item: WorkItem) -> Iterator[Document | Refused]:
        kind = format_of(item.file)
        for found in documents(item, kind, self._dataset.text_field):
            if isinstance(found, Document) and not found.text.strip():
                yield Refused(found.name, "the document is blank")
            else:
                yield found


def _documents_apart(file: InputFile) -> Sequence[PartOfFile]:
    """A long document is a part of its own: asking about it takes long, and is lost with its task.

    A file that turns out to be unreadable is one part, and refused when it is read.
    """
    kind = format_of(file)
    try:
        if kind == "txt":
            size = file.path.stat().st_size
            return [PartOfFile(0, size)] if size >= _GROUP_BYTES else WHOLE
        if kind == "jsonl":
            return list(_line_groups(file)) or WHOLE
        with parquet.ParquetFile(file.path) as reader:
            found, row = [], 1
            for group in range(reader.num_row_groups):
                found.append(PartOfFile(group, group + 1, row))
                row += reader.metadata.row_group(group).num_rows
        return found or WHOLE
    except (OSError, pa.ArrowException):
        return WHOLE


def _line_groups(file: InputFile) -> Iterator[PartOfFile]:
    start, first, place = 0, 1, 0
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            place += len(line)
            if place - start >= _GROUP_BYTES:
                yield PartOfFile(start, place, first)
                start, first = place, number + 1
    if place > start:
        yield PartOfFile(start, place, first)


@lru_cache(maxsize=4)
def _tokenizer(path: Path) -> TextTokenizer:
    return load_tokenizer(path)


def _generator(dataset: LongQaDataset, cache: Path) -> QaGenerator:
    spec = dataset.generator
    return OpenAiGenerator(spec, cache) if spec.url else ExtractiveGenerator()
