"""From recipe to shards: splits, cache, damaged files, two builders at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringworld_jobs.problem import JobSpecError
from ringworld_model.tokens import frames_of
from ringworld_model.vision.patch_codebook import PatchCodebook
from ringworld_workers.data.build_lock import ABANDONED_SECONDS, sole_builder
from ringworld_workers.data.files import DataError
from ringworld_workers.data.prepare import CODEBOOK_FILE, Prepared, build
from ringworld_workers.data.shards import Dataset
from ringworld_workers.data.tokenizer import load_tokenizer

RecipeMaker = Callable[..., Path]


def meta_of(prepared: Prepared, name: str) -> dict[str, Any]:
    return json.loads((prepared.datasets[name] / "meta.json").read_text())


def build_small(make_recipe: RecipeMaker, tmp_path: Path, **changes: object) -> Prepared:
    return build(make_recipe(tmp_path / "recipe", **changes), tmp_path / "cache")


def test_documents_are_text_between_bos_and_eos(small: Prepared) -> None:
    tokenizer = load_tokenizer(small.dir)
    assert small.tokenizer_size == tokenizer.size == 300
    train = Dataset(small.datasets["texts"], "train")
    assert train.longer == "split"
    names = [train.name(i) for i in range(len(train))]
    assert names == [f"text-{n}.txt" for n in (0, 1, 2, 4, 5)]
    for index, name in enumerate(names):
        tokens = train.read(index).tokens
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert (
            tokenizer.decode(tokens[1:-1]) == (small.dir.parents[1] / "recipe" / name).read_text()
        )
    held_out = Dataset(small.datasets["texts"], "held_out")
    assert [held_out.name(i) for i in range(len(held_out))] == ["text-3.txt"]


def test_clips_follow_lwm_in_both_layouts(small: Prepared) -> None:
    tokenizer = load_tokenizer(small.dir)
    train = Dataset(small.datasets["clips"], "train")
    assert train.longer == "refuse"
    # Grey frames 0..29 and 45..59, four a clip, every second: 14 and 6 clips, two layouts each.
    assert len(train) == 2 * (14 + 6)
    start, end = tokenizer.encode("<vision>"), tokenizer.encode("</vision>")
    caption = tokenizer.encode("a grey lamp")
    generate, describe = train.read(0), train.read(1)
    assert train.name(0) == "film from 0.000 s, 4 frames, text,vision"
    head, tail = [tokenizer.bos_id, *caption, *start], [*end, tokenizer.eos_id]
    clip = generate.tokens[generate.modality == 1]
    assert len(clip) == 4 * (4 + 1)
    frames_of(clip, codes_per_frame=4, codebook_size=16)
    assert clip[4::5].tolist() == [16, 16, 16, 17]
    assert generate.tokens.tolist() == [*head, *clip, *tail]
    assert generate.modality.tolist() == [0] * len(head) + [1] * len(clip) + [0] * len(tail)
    expected = [tokenizer.bos_id, *start, *clip, *end, *caption, tokenizer.eos_id]
    assert describe.tokens.tolist() == expected
    assert describe.loss_mask.tolist() == [1] * (len(expected) - 1) + [0]


def test_nothing_held_out_reaches_training(small: Prepared) -> None:
    codebook = PatchCodebook.load(small.dir / CODEBOOK_FILE)
    # The held-out stretch alone is red: no centroid may have seen it.
    colours = codebook.centroids.reshape(len(codebook.centroids), -1, 3)
    assert np.ptp(colours, axis=2).max() < 0.02
    train = Dataset(small.datasets["clips"], "train")
    starts = [float(train.name(i).split(" from ")[1].split(" s")[0]) for i in range(len(train))]
    assert all(start + 0.4 <= 3.0 + 1e-6 or start >= 4.5 for start in starts)
    held_out = Dataset(small.datasets["clips"], "held_out")
    # Frames 30..44: six clips, two layouts; they are all red, so one clip says it all.
    assert len(held_out) == 2
    assert meta_of(small, "clips")["left_out"] == {"examples equal to an earlier one": 10}
    caption = load_tokenizer(small.dir).encode("a red drum")
    assert held_out.read(0).tokens[1 : 1 + len(caption)].tolist() == caption


def test_entropy_and_counts_are_of_the_targets(small: Prepared) -> None:
    for name in ("texts", "clips"):
        meta = meta_of(small, name)
        for split in ("train", "held_out"):
            dataset = Dataset(small.datasets[name], split)
            examples = [dataset.read(i) for i in range(len(dataset))]
            for modality, number in (("text", 0), ("vision", 1)):
                targets = np.concatenate(
                    [
                        e.targets[(e.loss_mask != 0) & (e.target_modality == number)]
                        for e in examples
                    ]
                )
                if split == "train":
                    counts = np.bincount(
                        targets, minlength=len(meta["train_unigram_counts"][modality])
                    )
                    assert counts.tolist() == meta["train_unigram_counts"][modality]
                elif len(targets) == 0:
                    assert meta["held_out_entropy_nats"][modality] is None
                else:
                    shares = np.unique(targets, return_counts=True)[1] / len(targets)
                    entropy = -(shares * np.log(shares)).sum()
                    assert meta["held_out_entropy_nats"][modality] == pytest.approx(entropy)
            summary = meta["splits"][split]
            assert summary["examples"] == len(dataset)
            assert summary["tokens"] == int(dataset.lengths.sum())
            assert summary["text_tokens"] + summary["vision_tokens"] == summary["tokens"]


def test_meta_carries_credits_and_vocabulary(small: Prepared) -> None:
    texts, clips = meta_of(small, "texts"), meta_of(small, "clips")
    assert (texts["credits"], clips["credits"]) == (["Nobody"], ["A. Painter, CC0"])
    digest = load_tokenizer(small.dir).digest()
    assert texts["tokenizer"] == clips["tokenizer"] == {"size": 300, "digest": digest}
    codebook = PatchCodebook.load(small.dir / CODEBOOK_FILE)
    assert clips["codebook"]["digest"] == codebook.digest()


def test_the_second_build_is_found_and_any_change_is_a_new_one(
    make_recipe: RecipeMaker, tmp_path: Path
) -> None:
    first = build_small(make_recipe, tmp_path)
    phases: list[str] = []
    again = build(
        make_recipe(tmp_path / "recipe"),
        tmp_path / "cache",
        lambda phase, done, total: phases.append(phase),
    )
    assert (first.cached, again.cached) == (False, True)
    assert (again.dir, again.digest) == (first.dir, first.digest)
    assert {phase.split(",")[0] for phase in phases} == {"find files", "digest files"}
    # The same inputs in another place are the same data.
    elsewhere = build(make_recipe(tmp_path / "elsewhere"), tmp_path / "cache")
    assert elsewhere.cached
    changed = build_small(make_recipe, tmp_path, seed=1)
    recipe = make_recipe(tmp_path / "recipe")
    (tmp_path / "recipe" / "text-0.txt").write_text("other words")
    edited = build(recipe, tmp_path / "cache")
    assert len({first.dir, changed.dir, edited.dir}) == 3


def test_builds_are_equal_byte_for_byte(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    one = build(make_recipe(tmp_path / "recipe"), tmp_path / "one")
    two = build(make_recipe(tmp_path / "recipe"), tmp_path / "two")
    assert_same_files(one.dir, two.dir)


def test_of_two_builders_at_once_one_waits(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "recipe")
    waits, built = threading.Event(), []

    def second(phase: str, done: int, total: int) -> None:
        if phase.startswith("wait for"):
            waits.set()

    def first(phase: str, done: int, total: int) -> None:
        if phase.startswith("write clips"):
            # The first is about to finish; it holds the lock until the second has come to it.
            assert waits.wait(20)

    def build_first() -> None:
        built.append(build(recipe, tmp_path / "cache", first))

    thread = threading.Thread(target=build_first)
    thread.start()
    while not list((tmp_path / "cache").glob(".building-*.lock")) and thread.is_alive():
        thread.join(0.01)
    found = build(recipe, tmp_path / "cache", second)
    thread.join(20)
    assert (built[0].cached, found.cached, built[0].dir) == (False, True, found.dir)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [found.dir.name]


class Stopped(BaseException):
    pass


def test_a_build_that_stops_goes_on_with_what_is_missing(
    make_recipe: RecipeMaker, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path / "recipe")
    undisturbed = build(recipe, tmp_path / "undisturbed")
    stopped: set[str] = set()
    seen: list[str] = []

    def stop_at_what_is_new(phase: str, done: int, total: int) -> None:
        point = f"{phase.split(',')[0]} {done}/{total}"
        seen.append(point)
        if point not in stopped:
            stopped.add(point)
            raise Stopped

    # Stop at every point where a stop can be: after each report of progress.
    prepared = None
    while prepared is None:
        seen.clear()
        with contextlib.suppress(Stopped):
            prepared = build(recipe, tmp_path / "cache", stop_at_what_is_new)
    assert {"sample frames 1/1", "train tokenizer 0/0", "write clips 1/1"} <= stopped
    # The last try found all but the last steps done.
    assert not any(line.startswith(("fit", "train", "sample", "read")) for line in seen)
    assert_same_files(undisturbed.dir, prepared.dir)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [prepared.dir.name]


def assert_same_files(one: Path, two: Path) -> None:
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_leftovers_of_killed_builders_are_removed_after_a_week(
    make_recipe: RecipeMaker, tmp_path: Path
) -> None:
    old, living, young = (tmp_path / "cache" / f".building-{n}" for n in ("old", "alive", "young"))
    week_ago = time.time() - ABANDONED_SECONDS - 60
    for folder in (old, living, young):
        (folder / "examples").mkdir(parents=True)
        os.utime(folder / "examples", (week_ago, week_ago))
        if folder != young:
            os.utime(folder, (week_ago, week_ago))
    with sole_builder(living, lambda: None):
        build_small(make_recipe, tmp_path)
    assert [folder.exists() for folder in (old, living, young)] == [False, True, True]


def test_bad_files_are_skipped_and_listed(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "recipe")
    (tmp_path / "recipe" / "text-bad.txt").write_bytes(b"fine \xff\xfe not")
    (tmp_path / "recipe" / "text-empty.txt").write_text("")
    prepared = build(recipe, tmp_path / "cache")
    expected = [
        ("text-bad.txt", "not UTF-8 text (byte 5)"),
        ("text-empty.txt", "the file is empty"),
    ]
    assert prepared.refused == {"texts": 2, "clips": 0}
    assert prepared.refusals("texts", 5) == expected
    assert prepared.refusals("texts", 1) == expected[:1]
    assert meta_of(prepared, "texts")["refused"] == 2
    assert build(recipe, tmp_path / "cache").refused == prepared.refused
    for name, reason in expected:
        refuse = make_recipe(tmp_path / "recipe", bad_files="refuse")
        with pytest.raises(DataError, match=re.escape(f"datasets.texts: {name}: {reason}")):
            build(refuse, tmp_path / "cache")
        (tmp_path / "recipe" / name).unlink()


def test_an_error_when_nothing_is_left(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "recipe")
    (tmp_path / "recipe" / "film.mkv").write_bytes(b"no film")
    with pytest.raises(DataError, match=r"codebook: no frame to fit it on \(film\.mkv: .*\)"):
        build(recipe, tmp_path / "cache")
    texts = {"texts": {"kind": "text", "files": ["text-*.txt"], "documents": {"max_tokens": 2}}}
    with pytest.raises(DataError, match=r"datasets\.texts: no training example.*left out: 6 exam"):
        build_small(make_recipe, tmp_path, datasets=texts)


def test_a_tokenizer_without_a_text_says_why_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{kind: data, name: none, tokenizer: {train: {vocabulary_size: 300}},"
        " datasets: {texts: {kind: text, files: ['*.txt']}}}"
    )
    with pytest.raises(DataError, match=r"tokenizer\.train: no.*a\.txt: not UTF-8.*b\.txt:.*empty"):
        build(recipe, tmp_path / "cache")


def test_clips_without_a_caption_are_left_out_and_counted(
    make_recipe: RecipeMaker, tmp_path: Path
) -> None:
    film = {
        "path": "film.mkv",
        "captions": [{"start": 0.0, "end": 2.0, "text": "a lamp"}],
        "held_out": [{"start": 3.0, "end": 4.5}],
    }
    prepared = build_small(make_recipe, tmp_path, videos={"film": film})
    # Clips from 0 to 1.8 s are covered, at least in part: 10 of 20; none of the 6 held-out ones.
    assert meta_of(prepared, "clips")["left_out"] == {"clips without caption": 16}
    assert meta_of(prepared, "clips")["refused"] == 0
    assert len(Dataset(prepared.datasets["clips"], "train")) == 20


def test_training_text_is_limited_to_an_equal_share(
    make_recipe: RecipeMaker, tmp_path: Path
) -> None:
    limited = {"train": {"vocabulary_size": 300, "max_bytes": 1000}}
    full = {"train": {"vocabulary_size": 300}}
    one = build_small(make_recipe, tmp_path, tokenizer=limited)
    two = build_small(make_recipe, tmp_path, tokenizer=full)
    assert load_tokenizer(one.dir).digest() != load_tokenizer(two.dir).digest()
    # Text beyond the limit plays no part.
    recipe = make_recipe(tmp_path / "recipe", tokenizer=limited)
    longest = tmp_path / "recipe" / "text-5.txt"
    longest.write_text(longest.read_text() + " zebra zebra zebra" * 200)
    three = build(recipe, tmp_path / "cache")
    assert three.dir != one.dir
    assert load_tokenizer(three.dir).digest() == load_tokenizer(one.dir).digest()


def test_an_existing_tokenizer_is_taken(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    first = build_small(make_recipe, tmp_path)
    folder = tmp_path / "recipe" / "words"
    folder.mkdir()
    load_tokenizer(first.dir).save(folder)
    second = build_small(make_recipe, tmp_path, tokenizer={"path": "words"})
    assert second.dir != first.dir
    one, two = (meta_of(p, "texts") for p in (first, second))
    assert one["tokenizer"] == two["tokenizer"]
    assert one["train_unigram_counts"] == two["train_unigram_counts"]


@pytest.mark.parametrize(
    ("held_out", "says"), [(["text-9.txt"], r"datasets\.texts\.held_out.*'text-9.txt' matches")]
)
def test_a_held_out_pattern_that_matches_nothing_is_an_error(
    make_recipe: RecipeMaker, tmp_path: Path, held_out: list[str], says: str
) -> None:
    texts = {"kind": "text", "files": ["text-*.txt"], "held_out": held_out}
    with pytest.raises((DataError, JobSpecError), match=says):
        build_small(make_recipe, tmp_path, datasets={"texts": texts})


def test_text_alone_needs_no_codebook(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    texts = {"kind": "text", "files": ["text-*.txt"]}
    recipe = make_recipe(tmp_path / "recipe", datasets={"texts": texts}, codebook=None, videos={})
    prepared = build(recipe, tmp_path / "cache")
    assert prepared.codebook_size == 0
    assert meta_of(prepared, "texts")["codebook"] is None
    assert len(Dataset(prepared.datasets["texts"], "held_out")) == 0


def test_a_cache_that_cannot_be_written_is_named(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache cannot be made: File exists; name another folder"):
        build_small(make_recipe, tmp_path)
    (tmp_path / "cache").unlink()

    def fill(phase: str, *_: int) -> None:
        # What a full disk says, at the place where a tokenizer is written.
        if phase == "train tokenizer":
            raise OSError(errno.ENOSPC, "Error writing bytes to file")

    with pytest.raises(DataError, match=r"cache cannot be written: No space left .* make room"):
        build(tmp_path / "recipe" / "recipe.yaml", tmp_path / "cache", on_progress=fill)
    assert not build_small(make_recipe, tmp_path).cached
