"""Text documents from txt, jsonl, parquet and Hugging Face sets on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from ringworld_jobs.recipe import TextDataset
from ringworld_workers.data.draft import Draft, Refused, SpecialPart, TextPart, WorkItem
from ringworld_workers.data.files import DataError, InputFile, matches
from ringworld_workers.data.held_out import drawn_held_out, named_held_out
from ringworld_workers.data.hugging_face_sets import arrow_files, is_set
from ringworld_workers.data.text_sources import Document, Format, documents, format_of, parts


class TextReader:
    """The documents of one text dataset, each an example between bos and eos."""

    def __init__(self, name: str, dataset: TextDataset, base: Path, seed: int = 0) -> None:
        """Remember what to read; nothing is read yet.

        Args:
            name: of the dataset.
            dataset: its files and their format.
            base: folder of the recipe.
            seed: of the recipe, which draws the held-out share.
        """
        self._name, self._dataset, self._base, self._seed = name, dataset, base, seed

    def items(self) -> Sequence[WorkItem]:
        """The files by label, large ones in parts.

        Raises:
            DataError: a pattern of files or held_out matches nothing, or a Hugging Face set is not
                whole.
        """
        numbered = enumerate(
            (file, part) for file in self._files for part in parts(file, self._format(file))
        )
        return [
            WorkItem(self._name, number, file, part.start, part.stop, part.first)
            for number, (file, part) in numbered
        ]

    def training_texts(self, item: WorkItem) -> Iterator[str]:
        """The item's documents that are not held out, by name or by share."""
        for text, held_out in self._texts(item):
            share = self._dataset.held_out_share
            if not held_out and not drawn_held_out(_document(text), share, self._seed):
                yield text

    def drafts(self, item: WorkItem) -> Iterator[Draft | Refused]:
        """The item's documents; all but the first token carry loss."""
        bos, eos = SpecialPart("bos"), SpecialPart("eos")
        named = item.file.label in self._held_out
        for found in documents(item, self._format(item.file), self._dataset.text_field):
            if isinstance(found, Refused):
                yield found
            elif self._short(found):
                yield Refused(found.name, "documents shorter than min_chars", unusable=False)
            else:
                yield Draft(
                    found.name,
                    _document(found.text),
                    (bos, TextPart(found.text), eos),
                    held_out=True if named else None,
                )

    def _texts(self, item: WorkItem) -> Iterator[tuple[str, bool]]:
        for draft in self.drafts(item):
            if isinstance(draft, Draft):
                yield from (
                    (part.text, draft.held_out is True)
                    for part in draft.parts
                    if isinstance(part, TextPart)
                )

    def _short(self, document: Document) -> bool:
        # White space alone is no text.
        return len(document.text.strip()) < self._dataset.min_chars

    def _format(self, file: InputFile) -> Format:
        kind = self._dataset.format
        return format_of(file) if kind == "auto" else kind

    @cached_property
    def _files(self) -> list[InputFile]:
        found: dict[str, InputFile] = {}
        for pattern in self._dataset.files:
            try:
                found.update((file.label, file) for file in self._resolve(pattern))
            except DataError as error:
                raise DataError(f"datasets.{self._name}.files: {error}") from error
        return sorted(found.values(), key=lambda file: file.label)

    def _resolve(self, pattern: str) -> list[InputFile]:
        root, found = matches(pattern, self._base)
        kind = self._dataset.format
        files: list[InputFile] = []
        for entry in found:
            if entry.path.is_file() and not (kind == "hf" and entry.path.suffix != ".arrow"):
                files.append(entry)
            elif entry.path.is_dir() and (is_set(entry) if kind == "auto" else kind == "hf"):
                files += arrow_files(entry)
        if not files:
            what = "folder of a Hugging Face set" if kind == "hf" else "file"
            raise DataError(f"{pattern!r} matches no {what} in {root}; correct the path or pattern")
        return files

    @cached_property
    def _held_out(self) -> frozenset[str]:
        # Of a Hugging Face set, the folder's name is the split's.
        return named_held_out(
            self._name,
            self._dataset.held_out,
            self._files,
            lambda file: (
                (file.path.name, file.path.parent.name)
                if self._format(file) == "hf"
                else (file.path.name,)
            ),
        )


def _document(text: str) -> str:
    """A document's identity is its text: copies of it go to one split, wherever they stand."""
    return hashlib.sha256(text.encode()).hexdigest()
