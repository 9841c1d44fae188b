"""Rows for a parity check: a job's own, shortened where asked, packed and as one document.

R rows, S tokens of a whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ringworld_jobs.spec import DataSpec, JobSpec, StageSpec
from ringworld_model.batch import TENSOR_FIELDS, TrainBatch
from ringworld_model.config import ModelConfig
from ringworld_workers.data.files import DataError
from ringworld_workers.data.loader import StageLoader, check_tables
from ringworld_workers.data.prepare import build


@dataclass(frozen=True)
class JobData:
    """What a job trains on, prepared.

    Attributes:
        sources: dataset folder by source name.
        model_config: the job's model, table sizes filled in from the data.
        spec: which examples of each source are drawn, and where remote ones are kept.
    """

    sources: dict[str, str]
    model_config: ModelConfig
    spec: DataSpec = field(default_factory=DataSpec)


def open_data(spec: JobSpec, on_progress: Callable[[str, int, int], None]) -> JobData:
    """Find the job's data in the cache, or prepare it.

    Raises:
        DataError: an input is missing or useless.
        ValueError: the model's shape is impossible.
    """
    folders: dict[str, str] = {}
    tokenizer_size = codebook_size = None
    if spec.data.recipe is not None:
        prepared = build(Path(spec.data.recipe), Path(spec.data.cache), on_progress)
        folders = {name: str(path) for name, path in prepared.datasets.items()}
        tokenizer_size, codebook_size = prepared.tokenizer_size, prepared.codebook_size
    config = spec.model.config(text_vocab_size=tokenizer_size, codebook_size=codebook_size)
    return JobData(spec.data.places(folders), config, spec.data)


def first_rows(data: JobData, stage: StageSpec, seed: int, num_rows: int) -> TrainBatch:
    """The first rows that the stage trains on, [R, S].

    Raises:
        DataError: a source is missing, or does not fit the model's tables.
    """
    # The row planner counts rows over the whole stage: the batch size does not change them.
    tokens = num_rows * stage.context_length
    batch = {
        "global_batch_tokens": tokens,
        "micro_batch_size": num_rows,
        "validation_rows": 0,
    }
    loader = StageLoader(data.sources, stage.model_copy(update=batch), seed, data=data.spec)
    check_tables(loader, stage.name, data.model_config)
    return loader.step_rows(0)[0]


def shortened(rows: TrainBatch, context_length: int) -> TrainBatch:
    """Rows of ``context_length`` tokens that keep the documents' proportions.

    Every document keeps its first tokens, in proportion to its length: a prefix of the row would
    often hold one document alone, and packing would go unchecked.

    Args:
        rows: [R, S], S at least context_length.
        context_length: tokens of each new row.

    Returns:
        [R, context_length]; the rounding's remainder is padding.
    """
    length = rows.tokens.shape[1]
    if context_length >= length:
        return rows
    indices = torch.full((len(rows.document_lengths), context_length), length)
    kept: list[tuple[int, ...]] = []
    for row, documents in enumerate(rows.document_lengths):
        lengths: list[int] = []
        start = used = 0
        for document in documents:
            share = min(max(1, document * context_length // length), context_length - used)
            if share:
                indices[row, used : used + share] = torch.arange(start, start + share)
                lengths.append(share)
            used += share
            start += document
        kept.append(tuple(lengths))
    padding = indices == length
    indices.masked_fill_(padding, 0)
    tensors = {
        name: getattr(rows, name).gather(1, indices).masked_fill_(padding, 0)
        for name in TENSOR_FIELDS
    }
    return replace(rows, **tensors, document_lengths=tuple(kept))


def as_one_document(rows: TrainBatch) -> TrainBatch:
    """The same tokens, targets and weights, each row one document: attention is plain causal."""
    real = rows.segment_ids > 0
    positions = torch.arange(rows.tokens.shape[1], dtype=torch.int32).expand_as(rows.tokens)
    return replace(
        rows,
        segment_ids=real.to(torch.int32),
        position_ids=positions * real,
        document_lengths=tuple((sum(lengths),) for lengths in rows.document_lengths),
    )


def restarted_positions(rows: TrainBatch) -> torch.Tensor:
    """RoPE positions [R, S] by definition: each document counts from 0; padding holds 0."""
    positions = torch.zeros_like(rows.position_ids)
    for row, lengths in enumerate(rows.document_lengths):
        counted = torch.cat([torch.arange(length) for length in (0, *lengths)])
        positions[row, : len(counted)] = counted.to(positions.dtype)
    return positions


def require_targets(rows: TrainBatch) -> None:
    """Refuse rows without any target: their gradients are zero on any ring.

    Raises:
        DataError: says what to change.
    """
    if not (rows.loss_weights > 0).any():
        raise DataError(
            f"the {len(rows.document_lengths)} rows of {rows.tokens.shape[1]} tokens hold no "
            "target; raise --context-length or --rows"
        )
