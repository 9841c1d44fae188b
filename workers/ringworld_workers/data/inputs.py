"""Everything that a recipe reads: found, cut into tasks, and digested."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringworld_jobs.recipe import RecipeSpec
from ringworld_model.vision.patch_codebook import CODEBOOK_FILE
from ringworld_workers.data.draft import DatasetReader
from ringworld_workers.data.files import DataError, InputFile, file_digest, matches, resolve
from ringworld_workers.data.media_store import MediaUse
from ringworld_workers.data.readers import media_of
from ringworld_workers.data.shard_format import FORMAT_VERSION
from ringworld_workers.data.tokenizer import STORED_NAMES
from ringworld_workers.data.work import Task, cut_tasks, written_whole

_REMEMBERED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recipe reads.

    Attributes:
        tasks: of each dataset, in order.
        media: images and videos of each dataset, in order.
        tokenizer: files of an existing tokenizer; empty when one is trained.
        codebook: files of an existing frame tokenizer.
    """

    tasks: dict[str, list[Task]]
    media: dict[str, list[MediaUse]]
    tokenizer: list[InputFile]
    codebook: list[InputFile]

    def files(self) -> list[InputFile]:
        """Every file, once, by label.

        Two datasets may call different files alike: a conversation names its media below its
        dataset's own media_root.
        """
        found = {*self.tokenizer, *self.codebook}
        found.update(i.file for tasks in self.tasks.values() for t in tasks for i in t.items)
        found.update(use.file for uses in self.media.values() for use in uses)
        return sorted(found, key=lambda file: (file.label, file.path))


def find_inputs(recipe: RecipeSpec, base: Path, readers: dict[str, DatasetReader]) -> Inputs:
    """Find every file that a recipe names, or that a table or conversation of it names.

    Args:
        recipe: the recipe.
        base: folder that its paths are relative to.
        readers: of its datasets.

    Raises:
        DataError: a path or pattern matches no file; names the recipe's entry.
    """
    tasks: dict[str, list[Task]] = {}
    media: dict[str, list[MediaUse]] = {}
    for name, reader in readers.items():
        items = reader.items()
        tasks[name] = cut_tasks(name, items)
        media[name] = [use for item in items for use in media_of(reader, item)]
    return Inputs(tasks, media, _tokenizer_files(recipe, base), _codebook_files(recipe, base))


@dataclass(frozen=True, slots=True)
class DigestFiles:
    """Digests of files; those of large ones are remembered as long as the file is untouched.

    Attributes:
        folder: of what is remembered.
    """

    folder: Path

    def __call__(self, files: Sequence[InputFile]) -> list[tuple[str, str]]:
        """Label and SHA-256 of each file; the latter is empty where it cannot be read."""
        found = []
        for file in files:
            try:
                found.append((file.label, self._digest(file.path)))
            except OSError:
                # Its reader will say so; once it is readable, it is another input.
                found.append((file.label, ""))
        return found

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        if stat.st_size < _REMEMBERED_BYTES:
            return file_digest(path)
        known = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        place = self.folder / hashlib.sha256(json.dumps(known).encode()).hexdigest()
        try:
            return place.read_text(encoding="ascii")
        except FileNotFoundError:
            digest = file_digest(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as temporary:
            temporary.write_text(digest, encoding="ascii")
        return digest


def recipe_digest(recipe: RecipeSpec, digests: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over the recipe, the label and digest of each file, and the format version."""
    content = {
        "format": FORMAT_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "files": sorted(digests),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokenizer_files(recipe: RecipeSpec, base: Path) -> list[InputFile]:
    """The file, or the folder's files: its config names the document tokens."""
    names = (*STORED_NAMES, "tokenizer_config.json")
    return _of_path("tokenizer.path", recipe.tokenizer.path, base, lambda folder: names)


def _codebook_files(recipe: RecipeSpec, base: Path) -> list[InputFile]:
    def names(folder: Path) -> Iterator[str]:
        if (folder / CODEBOOK_FILE).is_file():
            yield CODEBOOK_FILE
            return
        for pattern in ("config.json", "*.safetensors"):
            yield from sorted(p.relative_to(folder).as_posix() for p in folder.rglob(pattern))

    path = recipe.codebook.path if recipe.codebook else None
    return _of_path("codebook.path", path, base, names)


def _of_path(
    where: str, path: str | None, base: Path, names: Callable[[Path], Iterable[str]]
) -> list[InputFile]:
    """The one file or folder at a path, as its files."""
    if path is None:
        return []
    try:
        found = matches(path, base)[1]
        if len(found) == 1 and found[0].path.is_dir():
            folder = found[0]
            wanted = tuple(names(folder.path))
            files = [
                InputFile(folder.path / name, f"{folder.label}/{name}")
                for name in wanted
                if (folder.path / name).is_file()
            ]
            if not files:
                raise DataError(f"{path!r} holds nothing of use; give another folder")
            return files
        files = resolve(path, base)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if len(files) > 1:
        raise DataError(f"{where}: {path!r} matches {len(files)} files; name one")
    return files


def codebook_place(files: Sequence[InputFile]) -> Path:
    """Where a loader finds the files of ``codebook.path``: the one, or the folder of all."""
    if len(files) == 1:
        return files[0].path
    return Path(os.path.commonpath([file.path.parent for file in files]))
