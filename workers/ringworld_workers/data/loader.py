"""The rows of a stage: planned from lengths, read from shards, packed for this rank's ring.

Step s trains on rows [s * rows_per_step, (s + 1) * rows_per_step) whatever the number of rings, so
a run that resumes on fewer sees the same data in the same order.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ringworld_jobs.spec import DataSpec, DocumentsSpec, StageSpec
from ringworld_model.batch import TrainBatch
from ringworld_model.config import ModelConfig
from ringworld_model.packing import WeightMode, pack_row, stack_rows
from ringworld_workers.data.files import DataError
from ringworld_workers.data.mixture import KEPT_ROWS, Bookmark, RowPlanner
from ringworld_workers.data.prefetch import PREFETCHED_STEPS
from ringworld_workers.data.row_plan import ExampleTooLong, RowPlan
from ringworld_workers.data.shard_cache import ShardCache
from ringworld_workers.data.shards import Dataset, Split
from ringworld_workers.data.source_walk import PlannedSource
from ringworld_workers.mesh import Mesh
from ringworld_workers.stage_job import StageJob

log = logging.getLogger(__name__)

SourceKind = Literal["text", "vision"]
KINDS: tuple[SourceKind, ...] = ("text", "vision")


def open_loader(job: StageJob, mesh: Mesh) -> StageLoader:
    """The loader of a job's stage for this rank's ring.

    Raises:
        DataError: a source is missing, or was not prepared with the model's tables.
    """
    loader = StageLoader(
        job.sources,
        job.stage,
        job.spec.seed,
        data=job.spec.data,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
    )
    check_tables(loader, job.stage.name, job.model_config)
    return loader


def check_tables(loader: StageLoader, stage_name: str, model: ModelConfig) -> None:
    """Refuse data whose ids are not those of the model's tables.

    Raises:
        DataError: too small a text table, or another codebook.
    """
    if loader.tokenizer_size > model.text_vocab_size:
        raise DataError(
            f"stage {stage_name!r}: the data's tokenizer has {loader.tokenizer_size} ids, "
            f"model.text_vocab_size={model.text_vocab_size}; raise it, or leave it empty"
        )
    # Not merely enough rows: eof and eov follow the last code.
    if loader.codebook_size not in (0, model.vision_codebook_size):
        raise DataError(
            f"stage {stage_name!r}: the data's codebook has {loader.codebook_size} codes, "
            f"model.vision.codebook_size={model.vision_codebook_size}; make them equal, or leave "
            f"the model's empty"
        )


class StageLoader:
    """Packed rows of one stage, by step. Any thread may call any method.

    Attributes:
        tokenizer_size: ids of the text tokenizer that all sources share.
        codebook_size: codes of the codebook that all sources with video share; 0 without any.
        left_out: training examples by source that the stage does not draw: outside the source's
            band, or longer than the context in a dataset that says to drop those.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        stage: StageSpec,
        seed: int,
        *,
        data: DataSpec | None = None,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        """Open the stage's sources and plan its rows.

        Args:
            sources: folder or URL of each prepared dataset by name; those that the mixture names
                are used.
            stage: context length, batch, mixture, packing and loss weights.
            seed: of the data order, together with the stage's name.
            data: which examples are drawn from each source, and where remote ones are kept; empty:
                all examples.
            data_parallel_rank: which ring this is.
            data_parallel_size: how many there are.

        Raises:
            DataError: a source is missing or empty, two sources were made with different
                tokenizers or codebooks, or an example does not fit a row.
            ValueError: the rows of a step do not come out even over rings and micro-batches.
        """
        share = data_parallel_size * stage.micro_batch_size
        if stage.rows_per_step % share:
            raise ValueError(
                f"stage {stage.name!r}: {stage.rows_per_step} rows a step are not divisible by "
                f"data_parallel_size * micro_batch_size = {data_parallel_size} * "
                f"{stage.micro_batch_size}; change mesh.data_parallel or global_batch_tokens"
            )
        data = data or DataSpec()
        self._stage = stage
        self._data_parallel_rank = data_parallel_rank
        self._data_parallel_size = data_parallel_size
        self._places = _used(sources, stage)
        self._cache = ShardCache(data.shard_cache.folder, data.shard_cache.max_bytes)
        # Each stage draws its own order, else every stage would begin with the same examples.
        self._seed = zlib.crc32(f"{seed}/{stage.name}".encode())
        self._lock = threading.RLock()
        self._datasets = self._open("train", self._places)
        self.tokenizer_size, self.codebook_size = _vocabulary(self._datasets)
        self.left_out: dict[str, int] = {}
        for name, dataset in self._datasets.items():
            part = data.sources.get(name)
            self._select(name, dataset, part.documents if part else DocumentsSpec())
        self._planner = self._plan(self._datasets, stage.mixture, epochs=None)
        # Opened now: held-out examples that fit no row shall stop a stage at its start.
        self._held_out = {k: self._open_held_out(k) for k in KINDS} if stage.validation_rows else {}

    def _select(self, name: str, dataset: Dataset, documents: DocumentsSpec) -> None:
        """Leave out what the source's band or the dataset itself keeps from this stage.

        Raises:
            DataError: nothing is left; with counts.
        """
        total, longest = len(dataset), int(dataset.lengths.max(initial=0))
        outside = dataset.keep_lengths(documents.min_tokens, documents.max_tokens)
        dropped = _drop_longer(dataset, self._stage.context_length)
        if len(dataset) == 0 and total:
            band = ", ".join(
                f"documents.{field}={value:,}"
                for field, value in documents.model_dump(exclude_none=True).items()
            )
            raise DataError(
                f"stage {self._stage.name!r}: source {name!r} is left without an example: of "
                f"{total:,} (the longest has {longest:,} tokens), {outside:,} lie outside its band "
                f"({band or 'it has none'}) and {dropped:,} more are longer than context_length="
                f"{self._stage.context_length:,} in a dataset with longer: {dataset.longer}; "
                "change the band or the context, or take the source out of the mixture"
            )
        if outside or dropped:
            self.left_out[name] = outside + dropped
            log.info(
                "source %s: %d of %d examples drawn (%d outside the band, %d longer than a row)",
                name,
                len(dataset),
                total,
                outside,
                dropped,
            )

    def row_range(self, step: int) -> range:
        """Global rows of a step (counted from 0), over all rings."""
        rows = self._stage.rows_per_step
        return range(step * rows, (step + 1) * rows)

    def step_rows(self, step: int) -> list[TrainBatch]:
        """This ring's share of a step's rows, in whole micro-batches [micro_batch_size, S]."""
        rows = self.row_range(step)
        share = len(rows) // self._data_parallel_size
        mine = rows[self._data_parallel_rank * share :][:share]
        size = self._stage.micro_batch_size
        weights = self._stage.loss.weights
        packed = [self._pack(plan, self._datasets, weights) for plan in self._plans(mine)]
        return [stack_rows(packed[start : start + size]) for start in range(0, share, size)]

    def _plans(self, rows: range) -> list[RowPlan]:
        with self._lock:
            plans = [self._planner.plan(row) for row in rows]
            for name, dataset in self._datasets.items():
                if dataset.remote:
                    dataset.prefetch(self._planner.coming_shards(name))
        return plans

    def bookmark(self, step: int) -> Bookmark | None:
        """A place from which a new loader reaches this step sooner than from the start."""
        with self._lock:
            return self._planner.bookmark(self.row_range(step).start)

    def open_at(self, bookmark: Bookmark) -> bool:
        """Continue from a bookmark; False, and nothing is done, if the data or mixture changed."""
        with self._lock:
            return self._planner.open_at(bookmark)

    def document_lengths(self, step: int) -> list[tuple[int, ...]]:
        """Tokens of each document in each of the step's rows, of every ring."""
        return [
            tuple(piece.stop - piece.start for piece in plan.pieces)
            for plan in self._plans(self.row_range(step))
        ]

    def sample_ids(self, step: int) -> list[str]:
        """Ids of the pieces in all of the step's rows, of every ring, in order.

        ``source/epoch/example/start-stop``, where the example is its number in the whole dataset,
        of which a source may draw a part.
        """
        return [
            replace(piece, index=self._datasets[piece.source].row(piece.index)).id
            for plan in self._plans(self.row_range(step))
            for piece in plan.pieces
        ]

    def padding_share(self, step: int) -> float:
        """Share of the step's tokens, over all rings, that are padding."""
        lengths = self.document_lengths(step)
        return 1 - sum(map(sum, lengths)) / (len(lengths) * self._stage.context_length)

    def held_out_rows(self, kind: SourceKind, limit: int) -> list[TrainBatch]:
        """Rows of examples that training never sees, the same on every rank and at every call.

        Each held-out example occurs once at most. Every target weighs the same, so that the loss
        is in nats per target.

        Args:
            kind: "text" takes the sources without video, "vision" those with.
            limit: rows at most.

        Returns:
            Batches of one row [1, S]; fewer than ``limit`` where the held-out splits end, none
            where the stage has no such source.
        """
        held_out = self._held_out[kind] if self._held_out else self._open_held_out(kind)
        if held_out is None:
            return []
        datasets, planner = held_out
        plans = zip(range(limit), planner.iter_from(0), strict=False)
        return [self._pack(plan, datasets, "token") for _, plan in plans]

    def _open_held_out(self, kind: SourceKind) -> tuple[dict[str, Dataset], RowPlanner] | None:
        """Whole held-out splits: parts of one dataset are scored once, on all of it."""
        places: dict[str, str] = {}
        weights: dict[str, float] = {}
        for name, place in sorted(self._places.items()):
            if _has_vision(self._datasets[name]) != (kind == "vision"):
                continue
            first = next((n for n, known in places.items() if known == place), name)
            places[first] = place
            weights[first] = weights.get(first, 0.0) + self._stage.mixture[name]
        datasets = self._open("held_out", places)
        for dataset in datasets.values():
            _drop_longer(dataset, self._stage.context_length)
        datasets = {name: dataset for name, dataset in datasets.items() if len(dataset)}
        return (datasets, self._plan(datasets, weights, epochs=1)) if datasets else None

    def _open(self, split: Split, places: Mapping[str, str]) -> dict[str, Dataset]:
        return {name: Dataset(place, split, self._cache) for name, place in places.items()}

    def _plan(
        self, datasets: Mapping[str, Dataset], weights: Mapping[str, float], epochs: int | None
    ) -> RowPlanner:
        rows = self._stage.rows_per_step
        try:
            return RowPlanner(
                {
                    name: PlannedSource(
                        lengths=dataset.lengths,
                        weight=weights[name],
                        splittable=dataset.splittable,
                        apart=dataset.pack_apart,
                        shard_sizes=dataset.shard_sizes,
                    )
                    for name, dataset in datasets.items()
                },
                self._stage.context_length,
                self._seed,
                packing=self._stage.packing,
                epochs=epochs,
                # What is read ahead does not push out what the step at hand is asked about.
                kept_rows=max(KEPT_ROWS, (PREFETCHED_STEPS + 3) * rows),
            )
        except ExampleTooLong as error:
            example = datasets[error.source].name(error.index)
            raise DataError(f"stage {self._stage.name!r}: {error} ({example})") from error

    def _pack(
        self, plan: RowPlan, datasets: Mapping[str, Dataset], weights: WeightMode
    ) -> TrainBatch:
        examples = [datasets[p.source].read(p.index, p.start, p.stop) for p in plan.pieces]
        return pack_row(examples, self._stage.context_length, weights)


def _drop_longer(dataset: Dataset, context_length: int) -> int:
    """Leave out what is longer than a row, where the dataset says so; how many were."""
    return dataset.keep_lengths(None, context_length + 1) if dataset.longer == "drop" else 0


def _used(sources: Mapping[str, str], stage: StageSpec) -> dict[str, str]:
    for name in stage.mixture:
        if name not in sources:
            known = ", ".join(sorted(sources)) or "none"
            raise DataError(
                f"stage {stage.name!r}: mixture.{name} names no source (known: {known})"
            )
    return {name: sources[name] for name in stage.mixture}


def _has_vision(dataset: Dataset) -> bool:
    return int(dataset.meta["splits"]["train"]["vision_tokens"]) > 0


def _vocabulary(datasets: Mapping[str, Dataset]) -> tuple[int, int]:
    """Sizes of the tokenizer and the codebook that the sources share.

    Raises:
        DataError: two sources were made with different ones, so that the same id would mean
            two things.
    """
    sizes = {"tokenizer": 0, "codebook": 0}
    for part in sizes:
        first: tuple[str, str] | None = None
        for name, dataset in datasets.items():
            entry = dataset.meta[part]
            # A text dataset carries its recipe's codebook, but uses none.
            if entry is None or (part == "codebook" and not _has_vision(dataset)):
                continue
            if first is not None and entry["digest"] != first[1]:
                raise DataError(
                    f"sources {first[0]!r} and {name!r} were made with different {part}s "
                    f"({first[1][:12]} and {entry['digest'][:12]}); prepare them in one recipe"
                )
            first = first or (name, entry["digest"])
            sizes[part] = int(entry["size"])
    return sizes["tokenizer"], sizes["codebook"]
