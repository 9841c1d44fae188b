"""Whole evaluations of a tiny checkpoint: the same figures on any ring, and after any stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringworld_jobs.evaluate_spec import EvaluateSpec, asked_for
from ringworld_model.config import ModelConfig
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_workers.data.shards import FORMAT_VERSION, ShardWriter
from ringworld_workers.evaluate.documents import longest_documents
from ringworld_workers.evaluate.job import EvaluationJob
from ringworld_workers.evaluate.no_tokenizer import coder_of
from ringworld_workers.evaluate.perplexity import doubled
from ringworld_workers.evaluate.run import EvaluationRun, run_evaluation, subject_of
from ringworld_workers.evaluate.short_context import ShortContext
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record
from ringworld_workers.generation.loading import load_model
from ringworld_workers.generation.source import ModelSource, RequestError
from ringworld_workers.mesh import build_mesh
from ringworld_workers.store.opening import open_store

CONTEXT_LENGTH = 192
CONFIG = ModelConfig(
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    text_vocab_size=50,
    vision_codebook_size=16,
    init_std=0.3,
)
ASKED = EvaluateSpec.model_validate(
    {"validation": {"rows": 3}, "perplexity": {"documents": 2}, "short_context": {}}
)


@dataclass
class Told:
    """A reporter that keeps answers, and asks to stop once it has so many."""

    stop_after: int | None = None
    answers: list[Record] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)

    def phase(self, name: str, step: int, ring: Any = None) -> None:
        self.phases.append(name)

    def answer(self, record: Record) -> None:
        self.answers.append(json.loads(json.dumps(record)))

    def event(self, record: Record) -> None:
        pass

    def should_stop(self) -> bool:
        return self.stop_after is not None and len(self.answers) >= self.stop_after


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Any) -> EvaluationJob:
    folder = tmp_path_factory.mktemp("evaluated")
    model = WorldModel(CONFIG, rope_theta=1e4)
    init_weights(model, seed=0)
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    ref = write_checkpoint(open_store(f"file://{folder}/checkpoints"), weights, stage="small")
    books = _books(folder / "books")
    source = ModelSource(
        label="small-1/small/8",
        config=CONFIG,
        rope_theta=1e4,
        context_length=CONTEXT_LENGTH,
        checkpoint=ref,
    )
    return EvaluationJob(
        run_id="small-1",
        attempt=1,
        world_size=1,
        sequence_parallel_size=1,
        data_parallel_size=1,
        device="cpu",
        precision="fp32",
        stage_name="small",
        stage_index=0,
        step=8,
        global_step=8,
        model=source,
        evaluations=ASKED,
        seed=0,
        context_length=CONTEXT_LENGTH,
        sources={"books": books},
        mixture={"books": 1.0},
        first_mixture={"books": 1.0},
        first_context_length=CONTEXT_LENGTH,
    )


def _books(folder: Path) -> str:
    folder.mkdir()
    draw = np.random.default_rng(0)
    shards = {}
    for split, lengths in (("train", [60, 80]), ("held_out", [250, 40, 160, 90])):
        with ShardWriter(folder, split) as shard:  # type: ignore[arg-type]
            for length in lengths:
                ids = draw.integers(0, CONFIG.text_vocab_size, length).astype(np.int32)
                kind, loss = np.zeros(length, np.uint8), np.ones(length, np.uint8)
                shard.add(ids, kind, loss, f"of {length}")
        shards[split] = {"shards": shard.entries()}
    meta = {
        "format": FORMAT_VERSION,
        "longer": "split",
        "pack_apart": False,
        "tokenizer": {"size": CONFIG.text_vocab_size, "digest": "t"},
        "codebook": None,
        "splits": shards | {"train": shards["train"] | {"vision_tokens": 0}},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def _evaluate(
    rank: int, size: int, job: EvaluationJob, stop_after: int | None
) -> tuple[dict[str, Any], list[Record]]:
    mesh = build_mesh(job.sequence_parallel_size, job.data_parallel_size)
    told = Told(stop_after)
    result = run_evaluation(job, mesh, told)  # type: ignore[arg-type]
    assert told.phases[0] == "load"
    return result, told.answers


def _figures(result: dict[str, Any]) -> dict[str, float]:
    assert result["status"] == "finished"
    return {
        f"{found['task']}.{name}": value
        for found in result["evaluations"]
        for name, value in found["figures"].items()
    }


def test_any_mesh_gives_the_same_figures_and_a_stop_loses_nothing(
    run_gang: Callable[..., list[Any]], job: EvaluationJob
) -> None:
    ((whole, answers),) = run_gang(_evaluate, 1, job, None)
    expected = _figures(whole)
    ids = [(answer["task"], answer["id"]) for answer in answers]
    assert len(set(ids)) == len(ids) == 3 + 2 * 4 + 4 * 2

    both = replace(job, world_size=2, sequence_parallel_size=2)
    results = run_gang(_evaluate, 2, both, None)
    assert _figures(results[0][0]) == pytest.approx(expected, rel=1e-5)
    assert len(results[0][1]) == len(answers) and results[1][1] == []

    # Two rings of one: killed after some answers, and begun anew with what was there.
    rings = replace(job, world_size=2, data_parallel_size=2)
    stopped = run_gang(_evaluate, 2, rings, 4)
    given = [answer for _, mine in stopped for answer in mine]
    assert stopped[0][0] == {"status": "stopped", "kept": len(given)}
    assert len(given) == 3 + 4, "within the second task"
    again = run_gang(_evaluate, 2, replace(rings, answers=tuple(given), attempt=2), None)
    new = [answer for _, mine in again for answer in mine]
    assert sorted((a["task"], a["id"]) for a in given + new) == sorted(ids)
    assert _figures(again[0][0]) == expected


def test_losses_are_those_of_a_dense_model(job: EvaluationJob) -> None:
    loaded = load_model(job.model, coder=coder_of(job.model, "cpu"))
    subject = subject_of(job, loaded)
    ring = EvaluationRing(loaded=loaded, group=None, rank=0, size=1, device=torch.device("cpu"))
    task = ShortContext(asked_for(["short_context"]).short_context, subject)  # type: ignore[arg-type]
    facts = {item.id: item.facts for item in task.items()}
    records = [{**facts[found["id"]], **found} for found in task.run(task.items(), ring)]
    documents = longest_documents(subject, job.mixture, 8, CONTEXT_LENGTH, "x")
    assert [document.name for document in documents] == ["of 250", "of 160", "of 90", "of 40"]
    for length in (48, CONTEXT_LENGTH):
        nll = weight = 0.0
        for document in documents:
            for piece in document.pieces(length):
                tokens = torch.from_numpy(piece.tokens.astype(np.int64))[None]
                logs = loaded.model.text_logits(tokens)[0].double().log_softmax(-1)
                targets = torch.from_numpy(piece.targets.astype(np.int64))[:, None]
                counted = torch.from_numpy(piece.loss_mask != 0)
                nll -= float(logs.gather(1, targets)[:, 0][counted].sum())
                weight += float(counted.sum())
        found = task.summarize(records)[f"loss_at_{length}"]
        assert found == pytest.approx(nll / weight, rel=1e-5)


def test_short_contexts_are_held_against_the_best_stage_before(job: EvaluationJob) -> None:
    settings = asked_for(["short_context"]).short_context
    assert settings is not None
    records = [
        {"id": f"books/{index}@{length}", "length": length, "nll": nll, "weight": 10.0}
        for length, nll in ((48, 22.0), (192, 20.0))
        for index in range(2)
    ]
    earlier = [
        {"task": "short_context", "items": 4, "loss_at_48": 2.5, "loss_at_192": 2.0},
        {"task": "short_context", "items": 4, "loss_at_48": 2.0, "loss_at_192": 2.1},
        {"task": "short_context", "items": 6, "loss_at_48": 1.0},  # of other documents
        {"task": "perplexity", "items": 4, "loss_at_48": 1.0},
    ]
    subject = subject_of(job, None)  # type: ignore[arg-type]
    first = ShortContext(settings, subject).summarize(records)
    later = ShortContext(settings, replace(subject, earlier=earlier)).summarize(records)
    assert first == {"worse": 0.0, "loss_at_48": 2.2, "loss_at_192": 2.0}
    assert later["worse"] == pytest.approx(0.1)
    (gate,) = settings.gates()
    assert gate.missed(later["worse"]) and not gate.missed(first["worse"])


def test_lengths_double_up_to_the_context() -> None:
    assert doubled(192) == [24, 48, 96, 192]
    assert doubled(8192) == [1024, 2048, 4096, 8192]
    assert doubled(12 * 1024) == [1024, 2048, 4096, 8192, 12 * 1024]


def test_a_model_without_its_tokenizer_says_so_when_asked_in_words(job: EvaluationJob) -> None:
    coder = coder_of(job.model, "cpu")
    with pytest.raises(RequestError, match=r"small-1/small/8 in words.*tokenizer is not at hand"):
        coder.tokenizer.encode("what?")


class _Careless:
    name = "needle"

    def __init__(self, record: Record) -> None:
        self._record = record

    def items(self) -> list[Item]:
        return [Item("a", {"depth": 0.5})]

    def run(self, items: Any, ring: Any) -> Any:
        yield {"id": "a", **self._record}

    def summarize(self, records: Any) -> dict[str, float]:
        return {}


def _careless(rank: int, size: int, job: EvaluationJob, record: Record) -> str:
    ring = EvaluationRing(loaded=None, group=None, rank=0, size=1, device=torch.device("cpu"))  # type: ignore[arg-type]
    run = EvaluationRun(job, build_mesh(1, 1), Told(), ring)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as caught:
        run.task(_Careless(record))
    return str(caught.value)


def test_records_that_cannot_be_kept_are_refused(
    run_gang: Callable[..., list[Any]], job: EvaluationJob
) -> None:
    (clash,) = run_gang(_careless, 1, job, {"step": 3})
    assert "'a' has 'step'" in clash
    (large,) = run_gang(_careless, 1, job, {"answer": "x" * 70_000})
    assert "more than 65,536" in large
