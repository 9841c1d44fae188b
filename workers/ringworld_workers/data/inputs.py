"""Everything a recipe reads: found, digested, and sorted into training and held out."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ringworld_jobs.recipe import RecipeSpec, TextDataset, VideoTextDataset
from ringworld_workers.data.files import DataError, InputFile, file_digest, resolve
from ringworld_workers.data.shards import FORMAT_VERSION
from ringworld_workers.data.tokenizer import STORED_NAMES


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file that could not be used."""

    path: str
    """The file as the recipe names it."""
    reason: str
    """Why not."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a recipe.

    Attributes:
        texts: documents of each text dataset.
        held_out: labels of the documents that are kept for validation, by text dataset.
        videos: file of each video that a dataset uses.
        tokenizer: files of an existing tokenizer; empty when one is trained.
    """

    texts: dict[str, list[InputFile]]
    held_out: dict[str, set[str]]
    videos: dict[str, InputFile]
    tokenizer: list[InputFile]

    def digest(self, recipe: RecipeSpec) -> str:
        """SHA-256 over the recipe, the name and content of each file, and the format version."""
        files: set[InputFile] = {*self.videos.values(), *self.tokenizer}
        files.update(file for documents in self.texts.values() for file in documents)
        content = {
            "format": FORMAT_VERSION,
            "recipe": recipe.model_dump(mode="json"),
            "files": sorted((file.label, file_digest(file.path)) for file in files),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_inputs(recipe: RecipeSpec, base: Path) -> Inputs:
    """Find every file that a recipe names.

    Args:
        recipe: the recipe.
        base: folder that its paths are relative to.

    Raises:
        DataError: a path or pattern matches no file; names the recipe's entry.
    """
    texts: dict[str, list[InputFile]] = {}
    held_out: dict[str, set[str]] = {}
    videos: dict[str, InputFile] = {}
    for name, dataset in recipe.datasets.items():
        if isinstance(dataset, TextDataset):
            found = [
                file
                for pattern in dataset.files
                for file in _resolve(f"datasets.{name}.files", pattern, base)
            ]
            texts[name] = sorted({file.label: file for file in found}.values(), key=_label)
            held_out[name] = _held_out(name, dataset, texts[name])
        elif isinstance(dataset, VideoTextDataset):
            for video in dataset.videos:
                where = f"videos.{video}.path"
                videos[video] = _one(where, recipe.videos[video].path, base)
    return Inputs(texts, held_out, videos, _tokenizer_files(recipe, base))


def _label(file: InputFile) -> str:
    return file.label


def _resolve(where: str, pattern: str, base: Path) -> list[InputFile]:
    try:
        return resolve(pattern, base)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _one(where: str, path: str, base: Path) -> InputFile:
    files = _resolve(where, path, base)
    if len(files) > 1:
        raise DataError(f"{where}: {path!r} matches {len(files)} files; name one")
    return files[0]


def _held_out(name: str, dataset: TextDataset, files: Iterable[InputFile]) -> set[str]:
    """Labels of the documents that match a held_out pattern; one that matches none is a slip."""
    chosen: set[str] = set()
    for pattern in dataset.held_out:
        matches = {f.label for f in files if fnmatch.fnmatchcase(f.path.name, pattern)}
        if not matches:
            raise DataError(
                f"datasets.{name}.held_out: {pattern!r} matches the name of none of the dataset's "
                f"files; correct it, or add the file to datasets.{name}.files"
            )
        chosen |= matches
    return chosen


def _tokenizer_files(recipe: RecipeSpec, base: Path) -> list[InputFile]:
    path = recipe.tokenizer.path
    if path is None:
        return []
    if not path.startswith("package:") and (base / path).is_dir():
        names = (*STORED_NAMES, "tokenizer_config.json")
        found = [
            InputFile(base / path / name, f"{path}/{name}")
            for name in names
            if (base / path / name).is_file()
        ]
        if not found:
            raise DataError(f"tokenizer.path: {path!r} holds none of {', '.join(names)}")
        return found
    return [_one("tokenizer.path", path, base)]


@dataclass(slots=True)
class Skipped:
    """Collects the files that could not be used, each once."""

    files: list[SkippedFile] = field(default_factory=list)

    def add(self, file: InputFile, reason: str) -> None:
        """Note a file."""
        entry = SkippedFile(file.label, reason.removeprefix(f"{file.path}: "))
        if entry not in self.files:
            self.files.append(entry)

    def of(self, labels: Iterable[str]) -> list[dict[str, str]]:
        """Entries about these files, for meta.json."""
        wanted = set(labels)
        return [asdict(entry) for entry in self.files if entry.path in wanted]


def read_text(file: InputFile) -> str:
    """A text file's content.

    Raises:
        DataError: it is not UTF-8, or cannot be read.
    """
    try:
        return file.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error


def readable_texts(
    files: Iterable[InputFile], min_chars: int, skipped: Skipped, on_file: Callable[[], None]
) -> tuple[list[InputFile], int]:
    """The documents that can be read and are long enough, and how many are too short.

    Args:
        files: candidates.
        min_chars: shorter ones are left out.
        skipped: unreadable ones are noted here.
        on_file: called after each file.
    """
    kept, short = [], 0
    for file in files:
        try:
            if len(read_text(file)) >= min_chars:
                kept.append(file)
            else:
                short += 1
        except DataError as error:
            skipped.add(file, str(error))
        on_file()
    return kept, short
