"""Samples back to text and frames, with their loss; lengths and packing; the two commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ringworld_model.ring import plan_ring
from ringworld_model.vision.frame_tokenizer import load_frame_tokenizer
from ringworld_platform.cli import app
from ringworld_workers.data.decode import ClipRun, Decoder, TextRun, find_datasets
from ringworld_workers.data.files import DataError
from ringworld_workers.data.packing_figures import length_bins, packing_figures
from ringworld_workers.data.prepare import Prepared
from ringworld_workers.data.shards import FORMAT_VERSION, Dataset, ShardWriter
from ringworld_workers.data.tokenizer import load_tokenizer

DatasetWriter = Callable[..., Path]


def test_a_clip_comes_back_as_its_caption_and_its_frames(small: Prepared) -> None:
    dataset = Dataset(small.datasets["clips"], "train")
    index = next(i for i in range(len(dataset)) if dataset.name(i).endswith("text,vision"))
    sample = Decoder(small.dir).sample(dataset, index)
    first, caption, clip, end = sample.runs
    assert isinstance(first, TextRun) and (first.text, first.loss) == ("<bos>", False)
    assert isinstance(caption, TextRun) and isinstance(end, TextRun)
    assert (caption.text, caption.loss) == ("a grey lamp<vision>", True)
    assert end.text == "</vision><eos>"
    assert isinstance(clip, ClipRun) and (clip.frames, clip.tokens, clip.note) == (4, 20, "")
    tokens, modality, _ = dataset.raw(index)
    codes = tokens[modality == 1].reshape(4, 5)[:, :-1]
    frames = load_frame_tokenizer(small.dir).decode(codes)
    assert np.array_equal(clip.pictures, frames)
    assert sample.loss_tokens == sample.tokens - 1


def test_loss_and_long_texts_are_shown(small: Prepared, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small.dir)
    question, answer = tokenizer.encode("who is it?"), tokenizer.encode("the drum")
    ids = np.array([*question, *answer, *tokenizer.encode("lamp " * 400)], np.int32)
    loss = np.zeros(len(ids), np.uint8)
    loss[len(question) : len(question) + len(answer)] = 1
    with ShardWriter(tmp_path, "train") as writer:
        writer.add(ids, np.zeros(len(ids), np.uint8), loss, "talk")
    meta = {"format": FORMAT_VERSION, "longer": "drop", "pack_apart": False, "codebook": None}
    meta["splits"] = {"train": {"shards": writer.entries()}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    sample = Decoder(small.dir, most_text=40).sample(Dataset(tmp_path, "train"), 0)
    assert [(run.text, run.loss) for run in sample.runs[:2]] == [
        ("who is it?", False),
        ("the drum", True),
    ]
    rest = sample.runs[2]
    assert isinstance(rest, TextRun) and not rest.loss
    assert f"[... {rest.tokens - 40:,} tokens ...]" in rest.text
    assert sample.loss_tokens == len(answer)


def test_padding_and_balance_are_those_of_the_rows(
    write_dataset: DatasetWriter, tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [60] * 40}, longer="refuse")
    found = packing_figures(Dataset(folder, "train"), 128, [2])
    assert (found.padding, found.examples) == (pytest.approx(8 / 128), 2)
    assert found.imbalance == {2: pytest.approx(plan_ring([60, 60], 128, 2).imbalance)}
    refused = packing_figures(Dataset(folder, "train"), 32, [2])
    assert refused.problem.startswith("40 examples do not fit (longest 60)")
    folder = write_dataset(tmp_path / "e", {"train": [60] * 40 + [500] * 3}, longer="drop")
    assert packing_figures(Dataset(folder, "train"), 128, []).dropped == 3
    assert packing_figures(Dataset(folder, "train"), 32, []).problem == "no example fits"
    assert length_bins([2, 3, 9, 9, 15]) == [(2, 4, 2), (4, 8, 0), (8, 16, 3)]
    assert length_bins([]) == []


def test_inspect_prints_and_draws(small: Prepared, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    arguments = ["--context", "1Ki,128", "--rings", "2", "--samples", "2", "--out", str(pictures)]
    found = CliRunner().invoke(app, ["data", "inspect", str(small.dir), *arguments])
    assert found.exit_code == 0, found.output
    for text in ("texts  text, longer: split", "a grey lamp<vision> [4 frames, 20 tokens]"):
        assert text in found.output
    names = {path.name for path in pictures.iterdir()}
    assert names == {f"{d}-{p}.png" for d in ("texts", "clips") for p in ("lengths", "samples")}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures.iterdir())
    wrong = CliRunner().invoke(app, ["data", "inspect", str(small.dir), "--dataset", "clip"])
    assert wrong.exit_code == 1
    assert "there are texts, clips" in wrong.output
    assert CliRunner().invoke(app, ["data", "inspect", "x", "--context", "1K"]).exit_code == 2


def test_check_lists_findings_and_fails(small: Prepared, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["data", "check", str(small.dir)])
    assert (found.exit_code, found.output.startswith("sound: ")) == (0, True)
    copy = Path(shutil.copytree(small.dir, tmp_path / "copy"))
    (copy / "clips" / "train-00000.arrow").unlink()
    (copy / "texts" / "held_out.lengths.npy").unlink()
    found = CliRunner().invoke(app, ["data", "check", str(copy)])
    assert found.exit_code == 1
    assert "clips/train-00000.arrow: cannot be read" in found.output
    assert "texts/held_out.lengths.npy: cannot be read" in found.output
    assert "2 findings" in found.output
    with pytest.raises(DataError, match="holds no meta.json"):
        find_datasets(tmp_path)
