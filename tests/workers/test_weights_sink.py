"""Weights as objects of a store: bounded memory, right sizes, and nothing left of a failure."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringworld_model.config import ModelConfig
from ringworld_model.hf import from_pretrained
from ringworld_model.hf_config import WeightsError
from ringworld_model.hf_layout import parameter_shapes
from ringworld_model.hf_save import write_pretrained
from ringworld_model.hf_sink import FolderSink
from ringworld_workers import weights_sink
from ringworld_workers.store.file_store import FileStore
from ringworld_workers.weights_sink import StoreSink, open_sink

CONFIG = ModelConfig(
    hidden_size=32,
    ffn_size=44,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    text_vocab_size=48,
    vision_codebook_size=16,
)


class Held(FileStore):
    """Keeps all that it is given until a put is complete, as a store may; notes the order."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.order: list[str] = []
        self.largest = 0

    def put(self, key: str, chunks: Iterable[Any]) -> None:
        self.order.append(key)
        held = list(chunks)
        self.largest = max(self.largest, *map(len, held))
        super().put(key, held)


def test_one_tensor_at_a_time_goes_to_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_sink, "_COPY_BYTES", 1000)
    memory: list[weakref.ref[Any]] = []

    def read(name: str) -> torch.Tensor:
        assert not any(held() is not None for held in memory), f"two tensors at {name}"
        array = np.full(parameter_shapes(CONFIG)[name], len(memory), np.float32)
        memory.append(weakref.ref(array))
        return torch.from_numpy(array)

    store = Held(tmp_path / "out")
    files = write_pretrained(
        StoreSink(store),
        CONFIG,
        read,
        rope_theta=1e4,
        max_shard_bytes=20_000,
        finish=lambda folder: (folder / "tokenizer.json").write_text("{}"),
    )
    # A header may be longer than a piece of a tensor; nothing else is.
    assert store.largest == 1000
    assert store.order[-2:] == ["model.safetensors.index.json", "config.json"]
    assert files == {info.key: info.size for info in store.list()} and "tokenizer.json" in files
    assert next(iter(files)) == "config.json"
    assert from_pretrained(store.root).config == CONFIG


def test_what_fails_leaves_nothing_and_what_is_there_stays(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "out")

    def read(name: str) -> torch.Tensor:
        return torch.zeros(5 if name == "norm.weight" else parameter_shapes(CONFIG)[name])

    with pytest.raises(WeightsError, match=r"norm\.weight is \[5\] and not \[32\]"):
        write_pretrained(StoreSink(store), CONFIG, read, rope_theta=1e4)
    assert store.list() == [] == list(store.unfinished())
    store.put("notes.txt", [b"mine"])
    with pytest.raises(WeightsError, match=r"out is not empty: it holds notes\.txt"):
        write_pretrained(StoreSink(store), CONFIG, read, rope_theta=1e4)
    assert store.get("notes.txt") == b"mine"


def test_a_place_is_a_folder_or_a_bucket(tmp_path: Path) -> None:
    for place in (str(tmp_path / "a"), f"file://{tmp_path}/a"):
        sink = open_sink(place)
        assert isinstance(sink, FolderSink) and sink.folder == tmp_path / "a"
    assert isinstance(open_sink("s3://bucket/weights"), StoreSink)
