"""Token shards: what is written is read, whole and in pieces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_workers.data.files import DataError
from ringworld_workers.data.shards import FORMAT_VERSION, Dataset, ShardWriter


def write(folder: Path, lengths: list[int], *, splittable: bool = True, batch: int = 64) -> Dataset:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "train", batch_tokens=batch) as writer:
        for number, length in enumerate(lengths):
            tokens = generator.integers(0, 999, length).astype(np.int32)
            modality = generator.integers(0, 2, length).astype(np.uint8)
            loss = generator.integers(0, 2, length).astype(np.uint8)
            writer.add(tokens, modality, loss, f"example {number}")
    meta = {"format": FORMAT_VERSION, "splittable": splittable}
    (folder / "meta.json").write_text(json.dumps(meta))
    return Dataset(folder, "train")


def test_examples_come_back_over_several_record_batches(tmp_path: Path) -> None:
    lengths = [50, 2, 200, 7, 7, 7, 64, 3]
    dataset = write(tmp_path / "d", lengths)
    generator = np.random.default_rng(0)
    assert dataset.lengths.tolist() == lengths
    for number, length in enumerate(lengths):
        tokens = generator.integers(0, 999, length)
        modality, loss = generator.integers(0, 2, length), generator.integers(0, 2, length)
        example = dataset.read(number)
        assert dataset.name(number) == f"example {number}"
        assert example.tokens.tolist() == tokens.tolist()
        assert example.modality.tolist() == modality.tolist()
        assert example.targets[:-1].tolist() == tokens[1:].tolist()
        assert example.target_modality[:-1].tolist() == modality[1:].tolist()
        assert example.loss_mask[:-1].tolist() == loss[1:].tolist()
        assert example.loss_mask[-1] == 0
        assert example.tokens.dtype == example.targets.dtype == np.int32


@settings(deadline=None)
@given(cuts=st.lists(st.integers(1, 99), max_size=8, unique=True))
def test_pieces_lose_no_target(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    folder = tmp_path_factory.getbasetemp() / "pieces"
    dataset = Dataset(folder, "train") if folder.exists() else write(folder, [30, 100])
    whole = dataset.read(1)
    edges = [0, *sorted(cuts), 100]
    pieces = [dataset.read(1, a, b) for a, b in zip(edges, edges[1:], strict=False)]
    for name in ("tokens", "modality", "targets", "target_modality", "loss_mask"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        assert joined.tolist() == getattr(whole, name).tolist()


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    clips = write(tmp_path / "clips", [9, 9], splittable=False)
    with pytest.raises(ValueError, match="not splittable"):
        clips.read(0, 0, 8)
    with pytest.raises(ValueError, match="tokens 4-10 of an example of 9"):
        clips.read(0, 4, 10)
    with pytest.raises(IndexError, match="example 2 of 2"):
        clips.read(2)
    with pytest.raises(DataError, match="holds no meta.json"):
        Dataset(tmp_path, "train")
    (tmp_path / "clips" / "meta.json").write_text('{"format": 99, "splittable": false}')
    with pytest.raises(DataError, match="format 99"):
        Dataset(tmp_path / "clips", "train")


def test_shards_of_another_build_are_refused(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [9, 9])
    np.save(dataset.folder / "train.lengths.npy", np.array([9], np.int32))
    with pytest.raises(DataError, match="holds 2 examples, its length index 1"):
        Dataset(dataset.folder, "train")


def test_an_empty_split_has_no_examples(tmp_path: Path) -> None:
    assert len(write(tmp_path / "d", [])) == 0
