"""From a data recipe to token shards, once: the result is cached by content.

A build reads, decodes, tokenizes and writes into a folder of its own, which one rename commits. So
a build that dies leaves nothing that looks finished, and of two builders at once one wins.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ringworld_jobs.load import load_recipe
from ringworld_jobs.recipe import RecipeSpec, TextDataset, VideoTextDataset
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.datasets import (
    DatasetWriter,
    EncodedVideo,
    Vocabulary,
    dataset_credits,
    write_clips,
    write_documents,
)
from ringworld_workers.data.files import DataError, InputFile
from ringworld_workers.data.frames import FrameSpool, fit_codebook, spool_video
from ringworld_workers.data.inputs import (
    Inputs,
    Skipped,
    SkippedFile,
    find_inputs,
    read_text,
    readable_texts,
)
from ringworld_workers.data.shards import FORMAT_VERSION, read_meta
from ringworld_workers.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

CODEBOOK_FILE = "codebook.npz"
"""The codebook's file in a prepared folder; the tokenizer's lies beside it."""

_ABANDONED_SECONDS = 86_400.0

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much (0: not known)."""


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
        skipped: files that could not be used.
    """

    dir: Path
    digest: str
    datasets: dict[str, Path]
    tokenizer_size: int
    codebook_size: int
    cached: bool
    skipped: tuple[SkippedFile, ...]


def build(recipe_path: Path, cache: Path, on_progress: Progress | None = None) -> Prepared:
    """Prepare a recipe's data, or find it in the cache.

    Args:
        recipe_path: the recipe's YAML; its paths are relative to it.
        cache: folder of prepared data; created where needed.
        on_progress: told what is being done, and how far it is.

    Raises:
        JobSpecError: the recipe is not valid.
        DataError: a file is missing, or a dataset is left without a training example.
    """
    recipe = load_recipe(recipe_path)
    inputs = find_inputs(recipe, recipe_path.parent)
    digest = inputs.digest(recipe)
    folder = cache / f"{recipe.name}-{digest[:16]}"
    if folder.is_dir():
        return open_prepared(folder, cached=True)
    _sweep(cache)
    temporary = cache / f".building-{digest[:16]}-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        _Build(recipe, inputs, temporary, on_progress or _ignore).run(digest)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another builder was faster; what it made is the same.
            return open_prepared(folder, cached=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_prepared(folder, cached=False)


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
        skipped=tuple(SkippedFile(**entry) for entry in meta["skipped"]),
    )


def _sweep(cache: Path) -> None:
    """Remove what builders that were killed left behind; a living one is younger than a day."""
    for folder in cache.glob(".building-*"):
        # Another builder may remove its own at any time.
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder)


def _ignore(phase: str, done: int, total: int) -> None:
    pass


class _Build:
    """One build: the steps in order, and what they hand on."""

    def __init__(
        self, recipe: RecipeSpec, inputs: Inputs, folder: Path, on_progress: Progress
    ) -> None:
        self.recipe, self.inputs, self.folder = recipe, inputs, folder
        self.on_progress = on_progress
        self.skipped = Skipped()
        self.texts: dict[str, list[InputFile]] = {}
        self.left_out: dict[str, dict[str, int]] = {name: {} for name in recipe.datasets}

    def run(self, digest: str) -> None:
        self._read_texts()
        with self._spooled_frames() as spools:
            tokenizer = self._tokenizer()
            tokenizer.save(self.folder)
            codebook = self._codebook(spools)
            vocabulary = Vocabulary(tokenizer, codebook)
            codes = self._encode(spools, codebook)
        for name in self.recipe.datasets:
            self._write(name, vocabulary, codes)
        meta = {
            "format": FORMAT_VERSION,
            "recipe": self.recipe.name,
            "digest": digest,
            "datasets": list(self.recipe.datasets),
            **vocabulary.meta(),
            "skipped": [asdict(entry) for entry in self.skipped.files],
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def _read_texts(self) -> None:
        total = sum(map(len, self.inputs.texts.values()))
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            self.on_progress("read texts", done, total)

        for name, files in self.inputs.texts.items():
            dataset = self.recipe.datasets[name]
            least = dataset.min_chars if isinstance(dataset, TextDataset) else 1
            self.texts[name], short = readable_texts(files, least, self.skipped, count)
            self.left_out[name]["documents shorter than min_chars"] = short

    @contextmanager
    def _spooled_frames(self) -> Iterator[dict[tuple[str, float], FrameSpool]]:
        """The frames of each video at each rate that a dataset asks for, on disk for a while."""
        codebook = self.recipe.codebook
        wanted = dict.fromkeys(
            (video, dataset.fps)
            for dataset in self.recipe.datasets.values()
            if isinstance(dataset, VideoTextDataset)
            for video in dataset.videos
        )
        spool_folder = self.folder / "frames"
        spool_folder.mkdir()
        spools = {}
        for number, (video, fps) in enumerate(wanted):
            file = self.inputs.videos[video]
            phase = f"decode {video} at {fps:g} fps"
            try:
                spools[video, fps] = spool_video(
                    file.path,
                    self.recipe.videos[video],
                    fps=fps,
                    size=codebook.frame_size if codebook else 0,
                    target=spool_folder / f"{number}.rgb",
                    on_frames=partial(self._report_frames, phase),
                )
            except DataError as error:
                self.skipped.add(file, str(error))
        yield spools
        shutil.rmtree(spool_folder)

    def _report_frames(self, phase: str, frames: int) -> None:
        self.on_progress(phase, frames, 0)

    def _tokenizer(self) -> TextTokenizer:
        training = self.recipe.tokenizer.train
        if training is None:
            path = self.inputs.tokenizer[0].path
            # A folder's files come together: its config names the document tokens.
            return load_tokenizer(path.parent if len(self.inputs.tokenizer) > 1 else path)
        self.on_progress("train tokenizer", 0, 0)
        return train_tokenizer(self._training_texts(training.max_bytes), training.vocabulary_size)

    def _training_texts(self, max_bytes: int | None) -> Iterator[str]:
        """What the tokenizer learns from: training documents, and captions not held out whole."""
        documents = [
            file
            for name, files in self.texts.items()
            for file in files
            if file.label not in self.inputs.held_out[name]
        ]
        share = None if max_bytes is None else max_bytes // max(1, len(documents))
        for file in documents:
            content = read_text(file).encode()[:share]
            # A cut may fall inside a character; its rest is dropped.
            yield content.decode(errors="ignore")
        for name in self.inputs.videos:
            video = self.recipe.videos[name]
            for caption in video.captions:
                held_out = (
                    s.start <= caption.start and caption.end <= s.end for s in video.held_out
                )
                if not any(held_out):
                    yield caption.text

    def _codebook(self, spools: dict[tuple[str, float], FrameSpool]) -> PatchCodebook | None:
        spec = self.recipe.codebook
        if spec is None or not spools:
            return None
        self.on_progress("fit codebook", 0, 0)
        training = [
            (spool, self.recipe.videos[video].held_out) for (video, _), spool in spools.items()
        ]
        try:
            codebook = fit_codebook(training, spec, self.recipe.seed)
        except ValueError as error:
            raise DataError(f"codebook: {error}") from error
        codebook.save(self.folder / CODEBOOK_FILE)
        return codebook

    def _encode(
        self, spools: dict[tuple[str, float], FrameSpool], codebook: PatchCodebook | None
    ) -> dict[tuple[str, float], EncodedVideo]:
        encoded: dict[tuple[str, float], EncodedVideo] = {}
        if codebook is None:
            return encoded
        for number, (key, spool) in enumerate(spools.items(), start=1):
            codes = spool.encode(codebook)
            encoded[key] = EncodedVideo(self.recipe.videos[key[0]], codes, spool.timeline)
            self.on_progress("encode frames", number, len(spools))
        return encoded

    def _write(
        self, name: str, vocabulary: Vocabulary, codes: dict[tuple[str, float], EncodedVideo]
    ) -> None:
        dataset = self.recipe.datasets[name]
        phase = f"write {name}"
        left_out = self.left_out[name]
        sampled: dict[str, dict[str, float]] = {}
        with DatasetWriter(self.folder / name, vocabulary) as writer:
            if isinstance(dataset, TextDataset):
                files = self.texts[name]
                write_documents(
                    writer,
                    files,
                    self.inputs.held_out[name],
                    vocabulary.tokenizer,
                    lambda done: self.on_progress(phase, done, len(files)),
                )
                labels = {file.label for file in self.inputs.texts[name]}
            else:
                videos = {v: e for (v, fps), e in codes.items() if fps == dataset.fps}
                left_out["clips without caption"] = write_clips(writer, dataset, videos, vocabulary)
                labels = {self.inputs.videos[video].label for video in dataset.videos}
                sampled = {
                    v: e.timeline.summary() for v, e in videos.items() if v in dataset.videos
                }
                self.on_progress(phase, 1, 1)
        meta: dict[str, Any] = {
            "name": name,
            "kind": dataset.kind,
            "longer": dataset.longer,
            "pack_apart": dataset.pack_apart,
            "videos": sampled,
            "credits": dataset_credits(dataset, self.recipe.videos),
            "skipped": self.skipped.of(labels),
            "left_out": left_out,
        }
        writer.write_meta(meta)
