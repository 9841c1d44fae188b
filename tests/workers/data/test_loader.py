"""Rows of a stage: the same at any number of rings, held-out rows apart, one vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ringworld_jobs.spec import DataSpec, StageSpec
from ringworld_model.batch import TrainBatch
from ringworld_workers.data.files import DataError
from ringworld_workers.data.loader import StageLoader, open_loader
from ringworld_workers.data.mixture import KEPT_ROWS
from ringworld_workers.data.prefetch import Prefetcher
from ringworld_workers.data.prepare import Prepared, build
from ringworld_workers.data.shards import Dataset
from ringworld_workers.mesh import Mesh
from ringworld_workers.stage_job import StageJob

RecipeMaker = Callable[..., Path]
DatasetWriter = Callable[..., Path]


@pytest.fixture
def prepared(small: Prepared) -> Prepared:
    return small


def make_stage(**changes: Any) -> StageSpec:
    fields: dict[str, Any] = {
        "name": "short",
        "context_length": 128,
        "rope_theta": 1e4,
        "steps": 10,
        "global_batch_tokens": 128 * 8,
        "mixture": {"texts": 0.3, "clips": 0.7},
        "learning_rate": {"peak": 1e-3},
    }
    return StageSpec(**(fields | changes))


def sources(prepared: Prepared) -> dict[str, str]:
    return {name: str(folder) for name, folder in prepared.datasets.items()}


def tokens(batches: list[TrainBatch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


def test_the_rings_together_train_on_the_same_rows(prepared: Prepared) -> None:
    alone = StageLoader(sources(prepared), make_stage(), 0)
    for step in (0, 3):
        expected = tokens(alone.step_rows(step))
        ids = alone.sample_ids(step)
        for size, micro in ((1, 4), (2, 2), (4, 2), (8, 1)):
            rings = [
                StageLoader(
                    sources(prepared),
                    make_stage(micro_batch_size=micro),
                    0,
                    data_parallel_rank=rank,
                    data_parallel_size=size,
                )
                for rank in range(size)
            ]
            batches = [ring.step_rows(step) for ring in rings]
            assert [row for share in batches for row in tokens(share)] == expected
            assert all(b.tokens.shape == (micro, 128) for share in batches for b in share)
            assert all(len(share) == 8 // size // micro for share in batches)
            assert all(ring.sample_ids(step) == ids for ring in rings)


def test_a_fresh_loader_resumes_anywhere(prepared: Prepared) -> None:
    first = StageLoader(sources(prepared), make_stage(), 5)
    steps = [tokens(first.step_rows(step)) for step in range(6)]
    resumed = StageLoader(sources(prepared), make_stage(), 5)
    assert tokens(resumed.step_rows(5)) == steps[5]
    assert tokens(resumed.step_rows(2)) == steps[2]
    other_seed = StageLoader(sources(prepared), make_stage(), 6)
    assert tokens(other_seed.step_rows(0)) != steps[0]
    other_stage = StageLoader(sources(prepared), make_stage(name="next"), 5)
    assert tokens(other_stage.step_rows(0)) != steps[0]
    assert first.row_range(2) == range(16, 24)


def test_ids_and_padding_describe_the_rows(prepared: Prepared) -> None:
    loader = StageLoader(sources(prepared), make_stage(), 0)
    for step in range(4):
        (batch, *rest) = loader.step_rows(step)
        segments = torch.cat([batch.segment_ids, *(b.segment_ids for b in rest)])
        padding = float((segments == 0).double().mean())
        assert loader.padding_share(step) == pytest.approx(padding)
        ids = loader.sample_ids(step)
        documents = [n for b in (batch, *rest) for row in b.document_lengths for n in row]
        assert len(ids) == len(documents)
        for sample, length in zip(ids, documents, strict=True):
            source, _, _, span = sample.split("/")
            start, stop = map(int, span.split("-"))
            assert source in ("texts", "clips")
            assert stop - start == length


def test_weight_mode_is_the_stages(prepared: Prepared) -> None:
    def weights(mode: str) -> torch.Tensor:
        stage = make_stage(mixture={"clips": 1.0}, loss={"weights": mode})
        batch = StageLoader(sources(prepared), stage, 0).step_rows(0)[0]
        return batch.loss_weights[batch.segment_ids == 1]

    assert set(weights("token").tolist()) == {0.0, 1.0}
    # Text and vision of one clip weigh 1 each.
    assert float(weights("example").sum()) == pytest.approx(2.0)


def test_held_out_rows_are_never_trained_on(prepared: Prepared) -> None:
    loader = StageLoader(sources(prepared), make_stage(), 0)
    trained = {tuple(row) for step in range(40) for row in tokens(loader.step_rows(step))}
    for kind in ("text", "vision"):
        rows = loader.held_out_rows(kind, 1000)
        assert rows
        assert all(row.tokens.shape == (1, 128) for row in rows)
        again = loader.held_out_rows(kind, 1000)
        assert tokens(again) == tokens(rows)
        assert tokens(loader.held_out_rows(kind, 2)) == tokens(rows)[:2]
        assert not trained & {tuple(row) for row in tokens(rows)}
        # In one pass over the split every target counts once, and the same.
        weights = torch.cat([row.loss_weights for row in rows])
        assert set(weights.unique().tolist()) <= {0.0, 1.0}
    clips = loader.held_out_rows("vision", 1000)
    held_out = Dataset(prepared.datasets["clips"], "held_out")
    assert sum(len(row.document_lengths[0]) for row in clips) == len(held_out) > 0
    assert all(int(row.modality.max()) == 1 for row in clips)
    text_only = StageLoader(sources(prepared), make_stage(mixture={"texts": 1.0}), 0)
    assert text_only.held_out_rows("vision", 4) == []
    assert all(int(row.modality.max()) == 0 for row in text_only.held_out_rows("text", 4))


def test_a_clip_that_does_not_fit_is_named(prepared: Prepared) -> None:
    with pytest.raises(DataError, match=r"stage 'short': .*=32; .*film from \d"):
        StageLoader(sources(prepared), make_stage(context_length=32, global_batch_tokens=256), 0)


def test_sources_of_two_codebooks_are_refused(
    prepared: Prepared, make_recipe: RecipeMaker, tmp_path: Path
) -> None:
    other = build(make_recipe(tmp_path / "recipe", seed=1), tmp_path / "cache")
    mixed = {"clips": str(prepared.datasets["clips"]), "more": str(other.datasets["clips"])}
    stage = make_stage(mixture={"clips": 0.5, "more": 0.5})
    with pytest.raises(DataError, match="'clips' and 'more' were made with different codebooks"):
        StageLoader(mixed, stage, 0)
    tokenizer = {"train": {"vocabulary_size": 310}}
    other = build(make_recipe(tmp_path / "recipe", tokenizer=tokenizer), tmp_path / "cache")
    mixed = {"texts": str(other.datasets["texts"]), "clips": str(prepared.datasets["clips"])}
    with pytest.raises(DataError, match="different tokenizers"):
        StageLoader(mixed, make_stage(), 0)


def test_what_does_not_come_out_even_is_refused(prepared: Prepared) -> None:
    with pytest.raises(ValueError, match=r"8 rows a step are not divisible.*3 \* 1"):
        StageLoader(sources(prepared), make_stage(), 0, data_parallel_size=3)
    with pytest.raises(DataError, match=r"mixture.books names no source \(known: clips, texts\)"):
        StageLoader(sources(prepared), make_stage(mixture={"books": 1.0}), 0)


@pytest.mark.parametrize(
    ("text_vocab_size", "codebook_size", "says"),
    [(300, 16, None), (512, 16, None), (299, 16, "has 300 ids"), (300, 32, "has 16 codes")],
)
def test_the_models_tables_must_fit_the_data(
    prepared: Prepared, text_vocab_size: int, codebook_size: int, says: str | None
) -> None:
    job = SimpleNamespace(
        sources=sources(prepared),
        stage=make_stage(),
        spec=SimpleNamespace(seed=0, data=DataSpec()),
        model_config=SimpleNamespace(
            text_vocab_size=text_vocab_size, vision_codebook_size=codebook_size
        ),
    )
    mesh = SimpleNamespace(data_parallel_rank=1, data_parallel_size=2)
    if says is None:
        loader = open_loader(cast(StageJob, job), cast(Mesh, mesh))
        expected = StageLoader(sources(prepared), make_stage(), 0).step_rows(0)
        assert tokens(loader.step_rows(0)) == tokens(expected)[4:]
    else:
        with pytest.raises(DataError, match=says):
            open_loader(cast(StageJob, job), cast(Mesh, mesh))


def test_a_bookmark_of_a_step_leads_there(prepared: Prepared) -> None:
    first = StageLoader(sources(prepared), make_stage(), 5)
    far = first.sample_ids(400)
    bookmark = first.bookmark(400)
    assert bookmark is not None
    assert 0 < bookmark["row"] <= first.row_range(400).start
    resumed = StageLoader(sources(prepared), make_stage(), 5)
    assert resumed.open_at(bookmark)
    assert resumed.sample_ids(400) == far
    assert not StageLoader(sources(prepared), make_stage(), 6).open_at(bookmark)


def test_a_step_of_many_rows_is_planned_once(prepared: Prepared) -> None:
    rows = 2 * KEPT_ROWS
    loader = StageLoader(sources(prepared), make_stage(global_batch_tokens=128 * rows), 0)
    ids = loader.sample_ids(0)
    walk = loader._planner._walk
    assert len(loader.document_lengths(0)) == rows
    assert loader.sample_ids(0) == ids
    assert loader._planner._walk is walk  # else it has started over


def test_held_out_examples_that_fit_no_row_stop_the_stage_at_its_start(
    write_dataset: DatasetWriter, tmp_path: Path
) -> None:
    splits = {"train": [50, 60], "held_out": [50, 200]}
    places = {"chat": str(write_dataset(tmp_path / "chat", splits, longer="refuse"))}
    stage = make_stage(mixture={"chat": 1.0})
    StageLoader(places, stage, 0)
    with pytest.raises(DataError, match=r"stage 'short': source 'chat'.*do not fit.*held_out 1"):
        StageLoader(places, stage.model_copy(update={"validation_rows": 2}), 0)


def bands(**limits: tuple[int | None, int | None]) -> DataSpec:
    return DataSpec.model_validate(
        {
            "sources": {
                name: {"dataset": "books", "documents": {"min_tokens": low, "max_tokens": high}}
                for name, (low, high) in limits.items()
            }
        }
    )


def test_bands_of_one_dataset_are_sources_of_their_own(
    write_dataset: DatasetWriter, tmp_path: Path
) -> None:
    lengths = [40, 90, 700, 120, 3000, 80, 650]
    splits = {"train": lengths, "held_out": [60, 5000]}
    data = bands(short=(None, 100), long=(600, 1000))
    places = data.places({"books": str(write_dataset(tmp_path / "books", splits))})
    stage = make_stage(mixture={"short": 0.5, "long": 0.5}, validation_rows=1000)
    loader = StageLoader(places, stage, 0, data=data)
    drawn: dict[str, set[int]] = {"short": set(), "long": set()}
    for step in range(20):
        for sample in loader.sample_ids(step):
            source, _, index, _ = sample.split("/")
            drawn[source].add(int(index))
    assert drawn == {"short": {0, 1, 5}, "long": {2, 6}}
    assert loader.left_out == {"short": 4, "long": 5}
    # Both come from one dataset, whose held-out split is scored once and as a whole.
    rows = loader.held_out_rows("text", 1000)
    assert sum(sum(row.document_lengths[0]) for row in rows) == 5060
    tokens_of = {tuple(row) for row in tokens(rows)}
    everything = StageLoader(
        {"books": places["short"]}, make_stage(mixture={"books": 1.0}, validation_rows=1000), 0
    )
    total = sum(sum(row.document_lengths[0]) for row in everything.held_out_rows("text", 1000))
    assert (total, len(tokens_of)) == (5060, len(rows))


def test_an_empty_band_is_refused_with_counts(write_dataset: DatasetWriter, tmp_path: Path) -> None:
    data = bands(long=(1000, None))
    folder = write_dataset(tmp_path / "books", {"train": [40, 900]})
    with pytest.raises(
        DataError, match=r"'long' .* of 2 \(the longest has 900 tokens\), 2 lie out"
    ):
        StageLoader(
            data.places({"books": str(folder)}), make_stage(mixture={"long": 1.0}), 0, data=data
        )


def test_longer_examples_are_split_dropped_or_refused(
    write_dataset: DatasetWriter, tmp_path: Path
) -> None:
    def open_with(longer: str) -> StageLoader:
        folder = tmp_path / longer
        write_dataset(folder, {"train": [40, 300, 128, 129], "held_out": [500]}, longer=longer)
        return StageLoader({"texts": str(folder)}, make_stage(mixture={"texts": 1.0}), 0)

    def indices(loader: StageLoader) -> set[str]:
        return {sample.split("/")[2] for step in range(9) for sample in loader.sample_ids(step)}

    assert indices(open_with("split")) == {"0", "1", "2", "3"}
    dropped = open_with("drop")
    assert indices(dropped) == {"0", "2"}
    assert dropped.left_out == {"texts": 2}
    assert dropped.held_out_rows("text", 5) == []
    with pytest.raises(DataError, match=r"example 1: 300 tokens do not fit.*\(train 1\)"):
        open_with("refuse")


def test_pieces_of_a_document_weigh_as_the_rows_that_it_fills(
    write_dataset: DatasetWriter, tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [40, 1000]})
    stage = make_stage(mixture={"d": 1.0}, loss={"weights": "example"})
    loader = StageLoader({"d": str(folder)}, stage, 0)
    weight: dict[str, float] = {}
    for step in range(10):
        rows = [row for batch in loader.step_rows(step) for row in batch.loss_weights.split(1)]
        ids = iter(loader.sample_ids(step))
        lengths = loader.document_lengths(step)
        for row, documents in zip(rows, lengths, strict=True):
            for part in row[0, : sum(documents)].split(documents):
                key = next(ids).rpartition("/")[0]
                weight[key] = weight.get(key, 0.0) + float(part.sum())
    assert weight["d/0/0"] == weight["d/1/0"] == pytest.approx(1)
    assert weight["d/0/1"] == weight["d/1/1"] == pytest.approx(999 / 128)


@pytest.mark.parametrize("packing", ["best_fit", "sequential"])
def test_killed_anywhere_the_ids_are_those_of_an_undisturbed_run(
    write_dataset: DatasetWriter, tmp_path: Path, packing: str
) -> None:
    generator = np.random.default_rng(0)
    texts = {"train": generator.integers(20, 400, 40).tolist()}
    chats = {"train": generator.integers(20, 140, 30).tolist()}
    write_dataset(tmp_path / "texts", texts, batch_tokens=200, file_bytes=1)
    write_dataset(tmp_path / "chats", chats, longer="drop", pack_apart=True)
    data = DataSpec.model_validate(
        {
            "sources": {
                "books": {"shards": str(tmp_path / "texts"), "documents": {"min_tokens": 50}},
                "chats": {"shards": str(tmp_path / "chats")},
            }
        }
    )
    stage = make_stage(packing=packing, mixture={"books": 0.3, "chats": 0.7})

    def start(size: int) -> StageLoader:
        return StageLoader(data.places({}), stage, 7, data=data, data_parallel_size=size)

    undisturbed = start(1)
    expected = [undisturbed.sample_ids(step) for step in range(400)]
    assert any(len({i.split("/")[0] for i in ids}) == 2 for ids in expected)
    found, step, bookmark = [], 0, None
    # Each life of the run is killed at its end, whatever it had planned ahead.
    for size, steps in ((1, 3), (4, 150), (2, 1), (8, 200), (1, 46)):
        loader = start(size)
        assert bookmark is None or loader.open_at(json.loads(json.dumps(bookmark)))
        with Prefetcher(loader.step_rows, range(step, 400)) as rows:
            for _ in range(steps):
                assert len(rows.take(step)) == 8 // size
                found.append(loader.sample_ids(step))
                step += 1
            bookmark = loader.bookmark(step)
    assert found == expected
    assert bookmark is not None
