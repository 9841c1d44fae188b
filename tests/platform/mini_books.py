"""Token shards of made-up documents, for jobs that train for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ringworld_workers.data.shards import FORMAT_VERSION, ShardWriter

VOCABULARY, CODEBOOK = 64, 16


def write_books(folder: Path, *, train: int, held_out: int, longest: int) -> None:
    """Write a dataset.

    Args:
        folder: which must not be there yet.
        train: documents to learn from.
        held_out: documents held out.
        longest: tokens of a document, at most.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    for split, count in (("train", train), ("held_out", held_out)):
        with ShardWriter(folder, split) as shard:  # type: ignore[arg-type]
            for length in generator.integers(10, longest + 1, count):
                ids = generator.integers(0, VOCABULARY, length).astype(np.int32)
                shard.add(ids, np.zeros(length, np.uint8), np.ones(length, np.uint8), "made up")
        splits[split] = {"shards": shard.entries()}
    splits["train"]["vision_tokens"] = 0
    meta = {
        "format": FORMAT_VERSION,
        "longer": "split",
        "pack_apart": False,
        "tokenizer": {"size": VOCABULARY, "digest": "t"},
        "codebook": {"size": CODEBOOK, "digest": "c"},
        "splits": splits,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
