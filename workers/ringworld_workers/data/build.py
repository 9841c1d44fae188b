"""One build: its phases in order, each of which goes on where a killed build left it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ringworld_jobs.recipe import Dataset, RecipeSpec
from ringworld_jobs.recipe_needles import NeedlesDataset
from ringworld_jobs.recipe_text import ChatDataset, LongQaDataset
from ringworld_jobs.recipe_vision import MediaTextDataset
from ringworld_workers.data.assemble import assemble
from ringworld_workers.data.chat_template import ChatTemplate
from ringworld_workers.data.draft import DatasetReader, Refused
from ringworld_workers.data.examples import ExampleRules, WriteExamples
from ringworld_workers.data.files import DataError
from ringworld_workers.data.frame_vocabulary import FrameVocabulary
from ringworld_workers.data.inputs import Inputs
from ringworld_workers.data.phases import Phases
from ringworld_workers.data.readers import Means, check_readers, credits_of, make_readers
from ringworld_workers.data.shard_format import FORMAT_VERSION, META_FILE, read_meta
from ringworld_workers.data.task_files import read_report
from ringworld_workers.data.tokenizer import (
    STORED_NAMES,
    TextTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from ringworld_workers.data.tokenizer_texts import (
    CountTexts,
    Share,
    TakeTexts,
    TextShare,
    once,
    stored_texts,
)
from ringworld_workers.data.vocabulary import Vocabulary, describe_tokenizer
from ringworld_workers.data.work import Task, whole_folder

ANSWERS_FOLDER = ".answers"
"""In the cache: what generators answered, shared by all builds. It may be removed at any time."""


_REASONS = 3
"""Refused texts that an error names."""


class Build:
    """One build of one recipe, in a folder of its own."""

    def __init__(
        self,
        recipe: RecipeSpec,
        base: Path,
        inputs: Inputs,
        cache: Path,
        folder: Path,
        phases: Phases,
    ) -> None:
        """Take what to build, and where.

        Args:
            recipe: the recipe.
            base: folder that its paths are relative to.
            inputs: everything that it reads.
            cache: folder of prepared data.
            folder: of this build; holds what an earlier try has done.
            phases: does the work.
        """
        self._recipe, self._base, self._inputs = recipe, base, inputs
        self._cache, self._folder, self._phases = cache, folder, phases
        self._tasks = [task for tasks in inputs.tasks.values() for task in tasks]

    def run(self, digest: str) -> Path:
        """Do what is left to do.

        Args:
            digest: of the inputs, for meta.json.

        Returns:
            The folder that holds the result, complete.

        Raises:
            DataError: see ``prepare.build``.
        """
        frames = FrameVocabulary(
            self._recipe, self._inputs, self._cache, self._folder, self._phases
        )
        frames.prepare()
        tokenizer_folder = self._folder / "tokenizer"
        answers = self._cache / ANSWERS_FOLDER
        means = Means(self._base, answers, tokenizer_folder, frames.store, frames.geometry)
        tokenizer = self._tokenizer(tokenizer_folder, make_readers(self._recipe, means))
        vocabulary = Vocabulary(describe_tokenizer(tokenizer), frames.description)
        (file,) = [path for name in STORED_NAMES if (path := tokenizer_folder / name).is_file()]
        means = replace(means, tokenizer_file=file)
        readers = make_readers(self._recipe, means)
        check_readers(readers.values())
        self._examples(readers, tokenizer_folder, vocabulary)
        result = self._folder / "result"
        for source in (tokenizer_folder, frames.folder):
            shutil.copytree(source, result, dirs_exist_ok=True)
        refused = {name: _refused(result / name) for name in self._recipe.datasets}
        meta = {
            "format": FORMAT_VERSION,
            "recipe": self._recipe.name,
            "digest": digest,
            "datasets": list(self._recipe.datasets),
            **vocabulary.meta(),
            "refused": refused,
        }
        (result / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        return result

    # --- tokenizer ---

    def _tokenizer(self, folder: Path, readers: dict[str, DatasetReader]) -> TextTokenizer:
        if not folder.is_dir():
            tokenizer = self._new_tokenizer(readers)
            with whole_folder(folder) as temporary:
                tokenizer.save(temporary)
        return load_tokenizer(folder)

    def _new_tokenizer(self, readers: dict[str, DatasetReader]) -> TextTokenizer:
        training, files = self._recipe.tokenizer.train, self._inputs.tokenizer
        if training is None:
            # A folder's files come together: its config names the document tokens.
            return load_tokenizer(files[0].path.parent if len(files) > 1 else files[0].path)
        tasks = list(once(self._tasks, lambda name: self._recipe.datasets[name].kind))
        taken = self._take_texts(tasks, readers, training.max_bytes)
        self._phases.say("train tokenizer")
        if next(stored_texts(taken), None) is None:
            raise DataError(
                f"tokenizer.train: no dataset gives it a text; {self._why_no_text(tasks, readers)}"
            )
        return train_tokenizer(
            stored_texts(taken), training.vocabulary_size, split_digits=training.split_digits
        )

    def _take_texts(
        self, tasks: Sequence[Task], readers: dict[str, DatasetReader], max_bytes: int | None
    ) -> list[Path]:
        """The files of the training texts: documents first, then captions."""
        folder, weight = self._folder / "texts", sum(task.weight for task in tasks)
        count, take = CountTexts(readers, folder), TakeTexts(readers, folder)
        if max_bytes is not None:
            list(self._phases.map("count texts", count, tasks, weight))
        shares: list[TextShare] = []
        # Captions are short: shared out with documents, they would leave most of the limit unused.
        for captions in (False, True):
            group = [task for task in tasks if self._has_captions(task) == captions]
            counts = [0 if max_bytes is None else count(task) for task in group]
            share, first = Share.of(max_bytes, sum(counts)), 0
            for task, texts in zip(group, counts, strict=True):
                shares.append(TextShare(task, share, first))
                first += texts
        list(self._phases.map("read texts", take, shares, weight))
        return [take.place(share.task) for share in shares]

    def _why_no_text(self, tasks: Sequence[Task], readers: dict[str, DatasetReader]) -> str:
        """Why the first few texts cannot be used."""
        reasons = (
            f"{entry.name}: {entry.reason}"
            for task in tasks
            if not self._has_captions(task)
            for item in task.items
            for entry in readers[task.dataset].drafts(item)
            if isinstance(entry, Refused)
        )
        first = list(islice(reasons, _REASONS))
        return "; ".join(first) or "all of them are held out, or the recipe has none"

    def _has_captions(self, task: Task) -> bool:
        return self._recipe.datasets[task.dataset].kind in ("video_text", "media_text")

    # --- examples ---

    def _examples(
        self, readers: dict[str, DatasetReader], tokenizer: Path, vocabulary: Vocabulary
    ) -> None:
        rules = {
            name: ExampleRules(
                self._recipe.seed,
                dataset.held_out_share,
                dataset.documents,
                vocabulary.codebook_size,
            )
            for name, dataset in self._recipe.datasets.items()
        }
        write = WriteExamples(readers, rules, tokenizer, self._folder / "examples")
        result = self._folder / "result"
        result.mkdir(exist_ok=True)
        left = [task for task in self._tasks if not (result / task.dataset).is_dir()]
        pending = [task for task in left if not write.done(task)]
        if len(pending) < len(left):
            done = len(left) - len(pending)
            self._phases.say(f"go on after {done} of {len(left)} parts of an earlier build")
        weight = sum(task.weight for task in pending)
        for dataset, refused in self._phases.map("read and tokenize", write, pending, weight):
            if refused is not None:
                self._refuse(dataset, refused)
        for name in self._recipe.datasets:
            if not (result / name).is_dir():
                self._assemble(name, write, vocabulary)

    def _assemble(self, name: str, write: WriteExamples, vocabulary: Vocabulary) -> None:
        dataset, places = self._recipe.datasets[name], self._places(name, write)
        if self._recipe.bad_files == "refuse":
            for refused in (entry for place in places for entry in read_report(place).refused):
                self._refuse(name, refused)
        meta: dict[str, Any] = {
            "name": name,
            "kind": dataset.kind,
            "longer": dataset.longer,
            "pack_apart": dataset.pack_apart,
            "credits": credits_of(self._recipe, dataset),
        }
        words = chat_words(dataset)
        if words is not None:
            meta["chat"] = words
        phase = f"write {name}"
        self._phases.say(phase, 0, len(places))
        with whole_folder(self._folder / "result" / name) as temporary:
            assemble(
                temporary,
                places,
                vocabulary,
                meta,
                deduplicate=dataset.deduplicate,
                on_place=lambda done: self._phases.say(phase, done, len(places)),
            )
        shutil.rmtree(write.folder / name, ignore_errors=True)

    def _places(self, name: str, write: WriteExamples) -> list[Path]:
        return [write.place(task) for task in self._inputs.tasks[name]]

    def _refuse(self, dataset: str, refused: Refused) -> None:
        if self._recipe.bad_files == "refuse":
            raise DataError(
                f"datasets.{dataset}: {refused.name}: {refused.reason} "
                f"(bad_files: skip leaves such out, and lists them)"
            )


def chat_words(dataset: Dataset) -> dict[str, str] | None:
    """How a dataset spells conversations, as ``ChatTemplate`` takes it; None: it has none."""
    if isinstance(dataset, NeedlesDataset):
        said = dataset.make.format
        given = {
            name: getattr(said, name) for name in ("system", "user_prefix", "assistant_prefix")
        }
        return asdict(ChatTemplate()) | {k: v for k, v in given.items() if v is not None}
    if isinstance(dataset, ChatDataset | LongQaDataset):
        fields = ("system", "user_prefix", "assistant_prefix")
        return {name: getattr(dataset, name) for name in fields}
    chats = isinstance(dataset, MediaTextDataset) and dataset.template == "chat"
    return asdict(ChatTemplate()) if chats else None


def _refused(folder: Path) -> int:
    return int(read_meta(folder)["refused"])
