"""Damage of every kind is found, named with its row, and nothing sound is blamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ringworld_model.vision.patch_codebook import CODEBOOK_FILE, PatchCodebook
from ringworld_workers.data.check import check_prepared
from ringworld_workers.data.prepare import Prepared
from ringworld_workers.data.shards import Dataset, ShardWriter

DatasetWriter = Callable[..., Path]


@pytest.fixture
def copy(small: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.dir, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[int, list[Any]], None]) -> None:
    """Write the training split anew, with its digests, after changing its rows' arrays."""
    dataset = Dataset(folder, "train")
    rows = [[array.copy() for array in dataset.raw(i)] for i in range(len(dataset))]
    names = [dataset.name(i) for i in range(len(dataset))]
    with ShardWriter(folder, "train") as writer:
        for index, row in enumerate(rows):
            change(index, row)
            writer.add(*row, names[index])
    change_meta(folder, lambda meta: meta["splits"]["train"].update(shards=writer.entries()))


def change_meta(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_what_a_build_made_is_sound(small: Prepared) -> None:
    files: list[str] = []
    assert check_prepared(small.dir, files.append) == []
    assert {"texts/train-00000.arrow", "clips/held_out-00000.arrow"} <= set(files)
    assert check_prepared(small.datasets["clips"]) == []


def test_a_flipped_byte_and_a_cut_file_are_found(copy: Path) -> None:
    shard = copy / "texts" / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    tokens = Dataset(copy / "texts", "train").raw(1)[0].copy()  # not a view of the file
    place = bytes(content).index(tokens.tobytes())
    content[place + 4 * 7 + 2] ^= 0x80  # in the third byte of token 7
    shard.write_bytes(content)
    name = Dataset(copy / "texts", "train").name(1)
    digest, row = check_prepared(copy)
    assert digest.startswith("texts/train-00000.arrow: sha256 ")
    assert row == (
        f"texts/train-00000.arrow: row 1 ({name}): token 7: "
        f"text id {int(tokens[7]) ^ 0x800000} is not one of the tokenizer's 300"
    )
    shard.write_bytes(content[: len(content) // 2])
    size, unreadable = check_prepared(copy / "texts")
    assert size == (
        f"texts/train-00000.arrow: {len(content) // 2:,} bytes, {len(content):,} were written"
    )
    assert "cannot be read as a shard" in unreadable
    shard.unlink()
    (gone,) = check_prepared(copy / "texts")
    assert gone == "texts/train-00000.arrow: cannot be read: No such file or directory"


def test_another_codebook_and_tokenizer_are_found(copy: Path) -> None:
    codebook = PatchCodebook.load(copy / CODEBOOK_FILE)
    shutil.copy(copy / CODEBOOK_FILE, copy / "kept")
    other = np.load(copy / "kept")
    arrays = {name: other[name] for name in other.files}
    changed = next(n for n, a in arrays.items() if a.ndim == 2)
    arrays[changed] = arrays[changed][::-1]
    np.savez(copy / CODEBOOK_FILE, **arrays)
    found = check_prepared(copy)
    assert len(found) == 3  # of the recipe, and of each dataset
    assert all(f"codebook.digest is {codebook.digest()}" in finding for finding in found)
    shutil.move(copy / "kept", copy / CODEBOOK_FILE)
    vocabulary = json.loads((copy / "tokenizer.json").read_text())
    pieces = vocabulary["model"]["vocab"]
    first, second = list(pieces)[-2:]
    pieces[first], pieces[second] = pieces[second], pieces[first]
    (copy / "tokenizer.json").write_text(json.dumps(vocabulary))
    found = check_prepared(copy)
    assert len(found) == 3
    assert all("tokenizer.digest is" in finding for finding in found)


def test_rows_that_were_written_wrong_are_named(copy: Path) -> None:
    clips = copy / "clips"
    change_meta(clips, lambda meta: meta.update(deduplicated=True))  # unknown keys do no harm
    size, per_frame = 16, 4

    def spoil(index: int, row: list[Any]) -> None:
        tokens, modality, loss = row
        vision = np.flatnonzero(modality == 1)
        if index == 1:
            tokens[vision[2]] = size + 2
        elif index == 2:
            tokens[vision[per_frame]] = size + 1  # eov after the first frame
            tokens[vision[-1]] = size  # eof after the last
        elif index == 3:
            modality[5], loss[6] = 2, 7
        elif index == 4:
            tokens[vision[1]] = size
        elif index == 5:
            row[:] = [np.delete(array, vision[3]) for array in row]
        elif index == 6:
            tokens[0] = -1

    rewrite(clips, spoil)
    found = check_prepared(clips)
    by_row = {n: [f for f in found if f": row {n} (" in f] for n in range(8)}
    assert by_row[0] == by_row[7] == []
    assert "vision id 18 is neither a code (below 16), eof nor eov" in by_row[1][0]
    assert "ends frame 3 in id 16, expected 17" in by_row[2][0]
    assert [f.partition("): ")[2] for f in by_row[3][:2]] == [
        "token 5: modality 2 is neither 0 nor 1",
        "token 6: loss 7 is neither 0 nor 1",
    ]
    assert "has an end id inside frame 0" in by_row[4][0]
    assert "has 19 tokens, which are not whole frames of 4 codes + 1 end id" in by_row[5][0]
    assert "token 0: text id -1 is not one of the tokenizer's 300" in by_row[6][0]
    (total,) = [f for f in found if "splits.train.tokens" in f]
    assert total.startswith("clips/meta.json: ")
    with pytest.raises(ValueError, match="3 tokens, 2 modalities"):
        ShardWriter(copy, "train").add(np.zeros(3, np.int32), *[np.zeros(2, np.uint8)] * 2, "x")


def test_index_totals_and_columns_are_compared(
    write_dataset: DatasetWriter, tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [5, 9, 7]}, batch_tokens=1, file_bytes=1)
    assert check_prepared(folder) == []
    np.save(folder / "train.lengths.npy", np.array([5, 8, 7], np.int32))
    index, row = check_prepared(folder)
    assert index == "d/train.lengths.npy: rows 1-1 are not as written for train-00001.arrow"
    assert row.endswith("row 1 (train 1): 9 tokens, the length index says 8")
    np.save(folder / "train.lengths.npy", np.array([5, 8], np.int32))
    assert "int32 [2]; int32 [3] is what the shards hold" in check_prepared(folder)[0]
    (folder / "train.lengths.npy").write_bytes(b"no array")
    assert "train.lengths.npy: cannot be read" in check_prepared(folder)[0]
    folder = write_dataset(tmp_path / "e", {"train": [5, 9, 7]})
    change_meta(folder, lambda meta: meta["splits"]["train"].update(tokens=20, examples=4))
    assert check_prepared(folder) == [
        "e/meta.json: splits.train.examples is 4, the shards hold 3",
        "e/meta.json: splits.train.tokens is 20, the shards hold 21",
    ]
    with pa.ipc.open_file(str(folder / "train-00000.arrow")) as reader:
        table = reader.read_all().drop_columns(["loss"])
    with pa.ipc.new_file(str(folder / "train-00000.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert any("columns ['tokens', 'modality', 'name'" in f for f in check_prepared(folder))
    change_meta(folder, lambda meta: meta.pop("longer"))
    assert check_prepared(folder) == ["e/meta.json: longer missing"]
    assert "holds no meta.json" in check_prepared(tmp_path)[0]
