"""Small sources and jobs for the real train loop, and a reporter that keeps what it is told.

Ranks in other processes import this too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ringworld_jobs.spec import JobSpec
from ringworld_model.batch import TEXT, VISION
from ringworld_model.config import ModelConfig
from ringworld_workers.data.shards import FORMAT_VERSION, ShardWriter
from ringworld_workers.stage_job import StageJob

MODEL = ModelConfig(
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    text_vocab_size=50,
    vision_codebook_size=16,
)
CONTEXT_LENGTH = 96
ROWS_PER_STEP = 4
NUM_STEPS = 6


class Collector:
    """A reporter that keeps everything, and asks to stop once ``stop_after`` steps are done."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self._stop_after, self._step = stop_after, 0

    def phase(self, name: str, step: int, ring: Any = None) -> None:
        self._step = step

    def metrics(self, record: dict[str, Any]) -> None:
        json.dumps(record)
        self.records.append(record)

    def event(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def position(self) -> int:
        return len(self.records)

    def stored(self, position: int) -> bool:
        return position <= len(self.records)

    def should_stop(self) -> bool:
        return self._stop_after is not None and self._step > self._stop_after


def write_source(folder: Path, examples: list[tuple[Any, Any]], longer: str) -> str:
    """A dataset of (tokens, modality) pairs, the first five of them held out."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(examples))
    num_vision = 0
    shards = {}
    for split, chosen in (("train", examples[5:]), ("held_out", examples[:5])):
        with ShardWriter(folder, split) as shard:  # type: ignore[arg-type]
            for tokens, modality in chosen:
                loss = (generator.random(len(tokens)) < 0.9).astype(np.uint8)
                shard.add(tokens, modality, loss, "made up")
                num_vision += int(modality.sum())
        shards[split] = {"shards": shard.entries()}
    meta = {
        "format": FORMAT_VERSION,
        "longer": longer,
        "pack_apart": False,
        "tokenizer": {"size": MODEL.text_vocab_size, "digest": "t"},
        "codebook": {"size": MODEL.vision_codebook_size, "digest": "c"},
        "splits": shards | {"train": shards["train"] | {"vision_tokens": num_vision}},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def text_document(generator: np.random.Generator, length: int) -> tuple[Any, Any]:
    """Random text."""
    ids = generator.integers(0, MODEL.text_vocab_size, length).astype(np.int32)
    return ids, np.full(length, TEXT, np.uint8)


def make_sources(folder: Path) -> dict[str, str]:
    """Documents that may be cut, and clips with captions that may not."""
    generator = np.random.default_rng(0)
    documents = [text_document(generator, n) for n in generator.integers(20, 250, 25)]
    clips = []
    for length in generator.integers(30, 60, 25):
        ids = generator.integers(0, MODEL.vision_codebook_size, length).astype(np.int32)
        modality = (np.arange(length) >= 8).astype(np.uint8) * VISION
        clips.append((ids, modality))
    return {
        "documents": write_source(folder / "documents", documents, longer="split"),
        "clips": write_source(folder / "clips", clips, longer="refuse"),
    }


def stage_job(
    sources: dict[str, str],
    checkpoint_url: str,
    *,
    sequence_parallel: int = 1,
    heads: int = 1,
    data_parallel: int = 1,
    stage_index: int = 0,
    attempt: int = 1,
    every: str = "2 steps",
    checkpoint: dict[str, Any] | None = None,
    recovery: dict[str, Any] | None = None,
    skip_steps: tuple[int, ...] = (),
    **stage: Any,
) -> StageJob:
    """A job of two stages.

    Args:
        sources: datasets by name.
        checkpoint_url: of its store.
        sequence_parallel: ranks of a ring.
        heads: of which so many split the heads.
        data_parallel: rings.
        stage_index: of the stage to train.
        attempt: of the gang.
        every: how often it saves.
        checkpoint: other fields of the spec's ``checkpoint``.
        recovery: fields of the spec's ``recovery``.
        skip_steps: left out.
        stage: fields of the first stage.
    """
    first = {
        "name": "first",
        "context_length": str(CONTEXT_LENGTH),
        "rope_theta": 1e4,
        "steps": NUM_STEPS,
        "global_batch_tokens": CONTEXT_LENGTH * ROWS_PER_STEP,
        "mixture": {"documents": 0.5, "clips": 0.5},
        "learning_rate": {"peak": 3e-3, "schedule": "cosine", "warmup_steps": 2},
        "validation_rows": 3,
    } | stage
    second = first | {"name": "second", "steps": 2, "optimizer_state": "inherit"}
    spec = {
        "kind": "train",
        "name": "small",
        "data": {},
        "optimizer": {"eps": 1e-6},
        "checkpoint": {"every": every, "keep": 9} | (checkpoint or {}),
        "recovery": recovery or {},
        "stages": [first, second],
    }
    return StageJob(
        run_id="small-1",
        spec=JobSpec.model_validate(spec),
        stage_index=stage_index,
        attempt=attempt,
        world_size=sequence_parallel * data_parallel,
        sequence_parallel_size=sequence_parallel,
        heads_size=heads,
        data_parallel_size=data_parallel,
        device="cpu",
        data_dir="",
        sources=sources,
        model_config=MODEL,
        checkpoint_url=checkpoint_url,
        skip_steps=skip_steps,
        spec_digest="d",
    )
