"""Score rows that training never sees, against the best that a unigram model could do on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ringworld_jobs.spec import StageSpec
from ringworld_model.batch import TrainBatch
from ringworld_model.loss import POSITION_BUCKETS, bucket_edges
from ringworld_workers.data.loader import SourceKind, StageLoader
from ringworld_workers.engine.base import Engine
from ringworld_workers.mesh import Mesh

SCORES_BY_KIND: dict[SourceKind, tuple[str, str | None]] = {
    "text": ("text", None),
    "vision": ("caption", "vision"),
}
"""What the text and the vision loss are called, by kind of source."""


def score_held_out(
    engine: Engine,
    loader: StageLoader,
    stage: StageSpec,
    mesh: Mesh,
    prepare: Callable[[TrainBatch], Any],
) -> dict[str, float]:
    """Loss of the held-out rows, by modality. A collective: every rank calls it.

    Text is scored on the text sources' held-out documents and vision on the video sources' held-out
    stretches; the captions of held-out clips are scored apart, since training has seen captions
    like them.

    Args:
        engine: holds the trained model.
        loader: gives the held-out rows of each source.
        stage: ``validation_rows`` rows are scored of each kind of source.
        mesh: this rank's place.
        prepare: plans and cuts whole rows for this rank's ring.

    Returns:
        ``loss_text``, ``loss_vision``, ``loss_caption`` (nats per target), ``accuracy_*`` (share of
        targets ranked first), ``targets_*`` (how many) and ``unigram_entropy_*``: the entropy of
        those very targets, which is the least loss that any model blind to context can reach on
        them, even one fitted to them. ``loss_*_from_N``: the loss of the targets from N tokens into
        their document to twice as far. Empty when the stage scores nothing.
    """
    scores: dict[str, float] = {}
    if not stage.validation_rows:
        return scores
    for kind, names in SCORES_BY_KIND.items():
        rows = loader.held_out_rows(kind, stage.validation_rows)
        if not rows:
            continue
        nll, correct, weight, by_position = _score(engine, rows, mesh, prepare)
        for modality, name in enumerate(names):
            if name is not None and weight[modality] > 0:
                scores[f"loss_{name}"] = float(nll[modality] / weight[modality])
                scores[f"accuracy_{name}"] = float(correct[modality] / weight[modality])
                scores[f"unigram_entropy_{name}"] = _entropy(rows, modality)
                scores[f"targets_{name}"] = float(_num_targets(rows, modality))
                starts = bucket_edges(stage.context_length)[:-1]
                for start, (part, share) in zip(starts, by_position[modality], strict=False):
                    if share > 0:
                        scores[f"loss_{name}_from_{start}"] = float(part / share)
    return scores


def _score(
    engine: Engine, rows: list[TrainBatch], mesh: Mesh, prepare: Callable[[TrainBatch], Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted nll, right guesses and weights by modality, over all ranks, float64 [2] each; and
    nll and weights by modality and bucket of positions, float64 [2, POSITION_BUCKETS, 2].

    Rings take rows in turn. When they do not come out even, a ring scores a row once more without
    weight: all ranks must call the model equally often, because its modules hold collectives.
    """
    totals = torch.zeros(3, 2, dtype=torch.float64)
    by_position = torch.zeros(2, POSITION_BUCKETS, 2, dtype=torch.float64)
    rings = mesh.data_parallel_size
    with engine.evaluate():
        for first in range(0, len(rows), rings):
            mine = first + mesh.data_parallel_rank
            row = rows[mine] if mine < len(rows) else _weightless(rows[-1])
            batch = prepare(row)
            sums = engine(batch.local, batch.ring)
            totals[0] += sums.nll.detach().double().cpu()
            totals[1] += sums.correct.detach().double().cpu()
            totals[2] += sums.weight.detach().double().cpu()
            by_position += sums.by_position.cpu()
    dist.all_reduce(totals, group=mesh.control_group)
    dist.all_reduce(by_position, group=mesh.control_group)
    return totals[0], totals[1], totals[2], by_position


def _weightless(row: TrainBatch) -> TrainBatch:
    return replace(row, loss_weights=torch.zeros_like(row.loss_weights))


def _targets(rows: list[TrainBatch], modality: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of the targets of one modality that carry loss, 1-D each."""
    ids, weights = [], []
    for row in rows:
        chosen = (row.target_modality == modality) & (row.loss_weights > 0)
        ids.append(row.targets[chosen])
        weights.append(row.loss_weights[chosen].double())
    return torch.cat(ids), torch.cat(weights)


def _num_targets(rows: list[TrainBatch], modality: int) -> int:
    return int(_targets(rows, modality)[0].numel())


def _entropy(rows: list[TrainBatch], modality: int) -> float:
    """Entropy in nats of the weighted distribution of the targets of one modality."""
    ids, weights = _targets(rows, modality)
    mass = torch.zeros(int(ids.max()) + 1, dtype=torch.float64).index_add_(0, ids, weights)
    share = mass[mass > 0] / mass.sum()
    return float(-(share * share.log()).sum())
