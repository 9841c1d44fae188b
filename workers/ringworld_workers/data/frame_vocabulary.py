"""The frame tokenizer of a recipe: fitted here, taken from a path, or that of given codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringworld_jobs.recipe import LwmDataset, RecipeSpec
from ringworld_model.vision.frame_tokenizer import FrameTokenizer, load_frame_tokenizer
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.files import DataError
from ringworld_workers.data.held_out import drawn_held_out
from ringworld_workers.data.inputs import Inputs, codebook_place
from ringworld_workers.data.lwm_reader import require_same_codebook
from ringworld_workers.data.media_store import CodeGeometry, MediaStore, MediaUse
from ringworld_workers.data.media_tasks import EncodeMedia, SampleFrames, media_tasks
from ringworld_workers.data.phases import Phases
from ringworld_workers.data.work import whole_folder

MEDIA_FOLDER = ".media"
"""In the cache: codes that existing tokenizers gave, shared by all builds. It may be removed at any
time. Those of a codebook that is fitted for one build are of use to that build alone."""
MEDIA_WEIGHT = 10
"""A byte of video takes about so many times as long as a byte of text."""


class FrameVocabulary:
    """The codebook of one build, and the codes of its media.

    Attributes:
        description: for meta.json; None: the recipe has no codes.
        geometry: of the codes; None: the recipe has none.
        store: codes of the media; None without a codebook of the recipe's own.
        folder: holds a copy of the codebook, or nothing.
    """

    def __init__(
        self, recipe: RecipeSpec, inputs: Inputs, cache: Path, folder: Path, phases: Phases
    ) -> None:
        """Take the recipe, what it reads, and where to work; nothing is read yet."""
        self._recipe, self._inputs, self._phases = recipe, inputs, phases
        self._cache, self._work = cache, folder
        self.folder = folder / "codebook"
        self.description: dict[str, Any] | None = None
        self.geometry: CodeGeometry | None = None
        self.store: MediaStore | None = None

    def prepare(self) -> None:
        """Fit or load the codebook, and encode every medium of the recipe.

        Raises:
            DataError: there are too few frames to fit it on, the file is none, or a dataset's codes
                are of another.
        """
        if not self.folder.is_dir():
            codebook = self._codebook()
            with whole_folder(self.folder) as temporary:
                if codebook is not None:
                    codebook.save(temporary)
        codebook = load_frame_tokenizer(self.folder) if any(self.folder.iterdir()) else None
        if codebook is not None:
            self.description = codebook.describe()
            self._encode(codebook)
        self._check_codes()
        if self.description is not None:
            size, codes = self.description["size"], self.description["codes_per_frame"]
            self.geometry = CodeGeometry(size, codes)

    def _codebook(self) -> FrameTokenizer | None:
        spec = self._recipe.codebook
        if spec is None:
            return None
        try:
            if spec.path is not None:
                return load_frame_tokenizer(codebook_place(self._inputs.codebook))
            uses = list(self._uses())
            if not uses:
                return None
            store = MediaStore(self._work / "media", spec.frame_size)
            tasks = media_tasks((use.file, use.sampling) for use in uses)
            weight = MEDIA_WEIGHT * sum(task.weight for task in tasks)
            list(self._phases.map("sample frames", SampleFrames(store), tasks, weight))
            self._phases.say("fit codebook")
            frames = store.fit_frames(uses)
            if len(frames) == 0:
                raise DataError(f"no frame to fit it on ({_why_none(store, uses)})")
            return PatchCodebook.fit(
                frames,
                spec.codebook_size,
                spec.patch_size,
                iterations=spec.iterations,
                seed=self._recipe.seed,
            )
        except ValueError as error:
            raise DataError(f"codebook: {error}") from error

    def _uses(self) -> Iterator[MediaUse]:
        """All media; whether each is held out is decided."""
        for name, uses in self._inputs.media.items():
            share, seed = self._recipe.datasets[name].held_out_share, self._recipe.seed
            for use in uses:
                held_out = use.held_out
                if held_out is None and not use.spans:
                    held_out = drawn_held_out(use.document, share, seed)
                yield replace(use, held_out=held_out)

    def _encode(self, codebook: FrameTokenizer) -> None:
        spec = self._recipe.codebook
        own = spec is not None and spec.path is None
        self.store = MediaStore(
            self._work / "media" if own else self._cache / MEDIA_FOLDER,
            codebook.frame_size,
            self.folder,
            codebook.digest(),
        )
        tasks = media_tasks((use.file, use.sampling) for use in self._uses())
        weight = MEDIA_WEIGHT * sum(task.weight for task in tasks)
        encode = EncodeMedia(self.store)
        list(self._phases.map("encode frames", encode, tasks, weight, accelerated=True))

    def _check_codes(self) -> None:
        """Hold what datasets say of their codes against the recipe's codebook, or each other."""
        for name, dataset in self._recipe.datasets.items():
            if not isinstance(dataset, LwmDataset) or dataset.codes is None:
                continue
            codes = dataset.codes
            if self.description is None:
                self.description = {
                    "kind": "codes",
                    "size": codes.codebook_size,
                    "codes_per_frame": codes.codes_per_frame,
                    "frame_size": None,
                    "digest": codes.codebook,
                }
            known = self.description
            geometry = CodeGeometry(known["size"], known["codes_per_frame"])
            path = self._recipe.codebook.path if self._recipe.codebook else None
            names = [known["digest"], known["kind"], path or ""]
            require_same_codebook(name, dataset, geometry, names)


def _why_none(store: MediaStore, uses: Sequence[MediaUse]) -> str:
    for use in uses:
        try:
            store.spool(use.file, use.sampling)
        except DataError as error:
            return f"{use.file.label}: {error}"
    return "all of it is held out"
