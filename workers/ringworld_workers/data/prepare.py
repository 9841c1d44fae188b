"""From a data recipe to token shards, once: the result is cached by content.

A build goes on in a folder of its own, named by the digest of all that it reads, and one rename
commits its result. What a killed build has done is found there when it is started again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ringworld_jobs.load import load_recipe
from ringworld_jobs.recipe import LwmDataset, RecipeSpec
from ringworld_model.vision.patch_codebook import CODEBOOK_FILE
from ringworld_workers.data.assemble import REFUSED_FILE
from ringworld_workers.data.build import Build
from ringworld_workers.data.build_lock import building_folder, sole_builder, sweep
from ringworld_workers.data.files import DataError
from ringworld_workers.data.inputs import DigestFiles, Inputs, find_inputs, recipe_digest
from ringworld_workers.data.media_store import CodeGeometry, MediaStore
from ringworld_workers.data.phases import LITTLE_BYTES, Cluster, Phases, connected
from ringworld_workers.data.readers import Means, make_readers
from ringworld_workers.data.shard_format import read_meta
from ringworld_workers.data.work import Progress, sync_files

__all__ = ["CODEBOOK_FILE", "Prepared", "Progress", "build", "open_prepared"]

_DIGEST_FILES = 64
"""Files that are digested at once."""
_DIGEST_WEIGHT = 16
"""Bytes are digested so many times faster than read as text."""
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk says that is full, or not to be written."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe's data, ready to train on.

    Attributes:
        dir: folder of the prepared data.
        digest: SHA-256 of the recipe and everything that it reads.
        datasets: folder of each dataset by name.
        tokenizer_size: ids of the text tokenizer.
        codebook_size: VQ codes; 0 without a codebook.
        cached: it had been built before.
        refused: how many files and records of each dataset could not be used.
    """

    dir: Path
    digest: str
    datasets: dict[str, Path]
    tokenizer_size: int
    codebook_size: int
    cached: bool
    refused: dict[str, int]

    def refused_file(self, name: str) -> Path:
        """What of a dataset could not be used, a JSON line each with its name and reason."""
        return self.datasets[name] / REFUSED_FILE

    def refusals(self, name: str, limit: int) -> list[tuple[str, str]]:
        """Name and reason of the first ``limit`` that could not be used."""
        found: list[tuple[str, str]] = []
        with self.refused_file(name).open(encoding="utf-8") as lines:
            for line in lines:
                if len(found) == limit:
                    break
                entry = json.loads(line)
                found.append((entry["name"], entry["reason"]))
        return found


def build(
    recipe_path: Path,
    cache: Path,
    on_progress: Progress | None = None,
    cluster: Cluster = connected,
    little_bytes: int = LITTLE_BYTES,
) -> Prepared:
    """Prepare a recipe's data, or find it in the cache.

    A build that is interrupted, in whatever way, goes on where it was when it is called again. Of
    two builds of the same data at once, one waits for the other.

    Args:
        recipe_path: the recipe's YAML; its paths are relative to it.
        cache: folder of prepared data; created where needed. Every machine of the cluster sees it
            and the inputs under the same path.
        on_progress: told what is being done, and how far it is.
        cluster: asked for a cluster when there is much to do, and only then; None: there is none,
            and this process does it all.
        little_bytes: how much text is too little for a cluster.

    Raises:
        JobSpecError: the recipe is not valid.
        DataError: a file is missing, one cannot be used and the recipe says refuse, a dataset is
            left without a training example, or the cache cannot be written.
    """
    recipe = load_recipe(recipe_path)
    phases = Phases(on_progress or _ignore, cluster, little_bytes)
    with _written_to(cache):
        return _build(recipe, recipe_path, cache, phases)


def _build(recipe: RecipeSpec, recipe_path: Path, cache: Path, phases: Phases) -> Prepared:
    # Workers of a cluster have another working directory.
    base, there = recipe_path.parent.absolute(), cache.absolute()
    inputs = _find(recipe, base, there, phases)
    digest = recipe_digest(recipe, _digests(inputs, there, phases))
    folder = cache / f"{recipe.name}-{digest[:16]}"
    if folder.is_dir():
        return open_prepared(folder, cached=True)
    building = building_folder(there, digest)
    with sole_builder(building, lambda: phases.say("wait for another build of the same data")):
        if folder.is_dir():
            return open_prepared(folder, cached=True)
        sweep(there)
        building.mkdir(exist_ok=True)
        result = Build(recipe, base, inputs, there, building, phases).run(digest)
        sync_files(result)
        os.rename(result, folder)
        shutil.rmtree(building, ignore_errors=True)
    return open_prepared(folder, cached=False)


@contextmanager
def _written_to(cache: Path) -> Iterator[None]:
    """Make the cache, and say what to do where its disk is full or not to be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache {cache} cannot be made: {error.strerror}; name another folder (--cache, "
            f"data.cache of a job)"
        ) from error
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        raise DataError(
            f"the cache {cache} cannot be written: {os.strerror(error.errno)}; make room, or name "
            f"another folder (--cache, data.cache of a job). What is done is kept"
        ) from error


def open_prepared(folder: Path, *, cached: bool = True) -> Prepared:
    """Describe a folder that ``build`` made.

    Raises:
        DataError: it is none, or of another format version.
    """
    meta = read_meta(folder)
    return Prepared(
        dir=folder,
        digest=meta["digest"],
        datasets={name: folder / name for name in meta["datasets"]},
        tokenizer_size=meta["tokenizer"]["size"],
        codebook_size=meta["codebook"]["size"] if meta["codebook"] else 0,
        cached=cached,
        refused=dict(meta["refused"]),
    )


def _find(recipe: RecipeSpec, base: Path, cache: Path, phases: Phases) -> Inputs:
    phases.say("find files")
    # Only to name what they read: nothing is decoded, and no code is looked at.
    given = any(isinstance(d, LwmDataset) and d.codes for d in recipe.datasets.values())
    media = MediaStore(cache, 1) if recipe.codebook is not None else None
    geometry = CodeGeometry(1, 1) if media or given else None
    means = Means(base, cache, cache, media, geometry)
    return find_inputs(recipe, base, make_readers(recipe, means))


def _digests(inputs: Inputs, cache: Path, phases: Phases) -> list[tuple[str, str]]:
    files = inputs.files()
    weight = sum(_size(file.path) for file in files) // _DIGEST_WEIGHT
    groups = [files[i : i + _DIGEST_FILES] for i in range(0, len(files), _DIGEST_FILES)]
    digest = DigestFiles(cache / ".digests")
    return [pair for some in phases.map("digest files", digest, groups, weight) for pair in some]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _ignore(phase: str, done: int, total: int) -> None:
    pass
