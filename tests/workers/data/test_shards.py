"""Token shards: what is written is read, whole and in pieces."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_workers.data.files import DataError
from ringworld_workers.data.shard_writer import FILE_BYTES
from ringworld_workers.data.shards import FORMAT_VERSION, Dataset, ShardWriter


def write(
    folder: Path,
    lengths: list[int],
    *,
    longer: str = "split",
    batch: int = 64,
    file_bytes: int = FILE_BYTES,
) -> Dataset:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "train", batch_tokens=batch, file_bytes=file_bytes) as writer:
        for number, length in enumerate(lengths):
            tokens = generator.integers(0, 999, length).astype(np.int32)
            modality = generator.integers(0, 2, length).astype(np.uint8)
            loss = generator.integers(0, 2, length).astype(np.uint8)
            writer.add(tokens, modality, loss, f"example {number}")
    meta = {
        "format": FORMAT_VERSION,
        "longer": longer,
        "pack_apart": False,
        "splits": {"train": {"shards": writer.entries()}},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return Dataset(folder, "train")


@pytest.mark.parametrize(("file_bytes", "num_files"), [(FILE_BYTES, 1), (3500, 2), (1, 3)])
def test_examples_come_back_over_batches_and_files(
    tmp_path: Path, file_bytes: int, num_files: int
) -> None:
    lengths = [50, 2, 200, 7, 7, 7, 64, 3]
    dataset = write(tmp_path / "d", lengths, file_bytes=file_bytes)
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
        counted = modality[1:][loss[1:] == 1]
        assert example.whole_targets == ((counted == 0).sum(), (counted == 1).sum())
    assert len(dataset.entries) == num_files
    assert sum(entry["tokens"] for entry in dataset.entries) == sum(lengths)
    assert [entry["file"] for entry in dataset.entries] == sorted(
        path.name for path in (tmp_path / "d").glob("*.arrow")
    )
    for entry in dataset.entries:
        content = (tmp_path / "d" / entry["file"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


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
    clips = write(tmp_path / "clips", [9, 9], longer="refuse")
    with pytest.raises(ValueError, match=r"may not be cut \(longer: refuse\)"):
        clips.read(0, 0, 8)
    with pytest.raises(ValueError, match="tokens 4-10 of an example of 9"):
        clips.read(0, 4, 10)
    with pytest.raises(IndexError, match="example 2 of 2"):
        clips.read(2)
    with pytest.raises(DataError, match="holds no meta.json"):
        Dataset(tmp_path, "train")
    (tmp_path / "clips" / "meta.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99"):
        Dataset(tmp_path / "clips", "train")


def test_files_of_another_build_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write(folder, [9, 9])
    np.save(folder / "train.lengths.npy", np.array([9], np.int32))
    with pytest.raises(DataError, match="counts 1 examples, the shards hold 2"):
        Dataset(folder, "train")
    np.save(folder / "train.lengths.npy", np.array([9, 8], np.int32))
    with pytest.raises(DataError, match="examples 0-1 are not those of train-00000.arrow"):
        Dataset(folder, "train")
    write(folder, [9, 9])
    shard = folder / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00000.arrow has \d+ bytes, \d+ were written"):
        Dataset(folder, "train").read(0)
    shard.unlink()
    with pytest.raises(DataError, match="train-00000.arrow is missing"):
        Dataset(folder, "train").read(0)


def test_an_empty_split_has_no_examples(tmp_path: Path) -> None:
    assert len(write(tmp_path / "d", [])) == 0
