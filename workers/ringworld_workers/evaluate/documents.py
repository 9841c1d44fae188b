"""Long held-out documents, cut into pieces: the same targets with more or less before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ringworld_model.batch import TrainBatch
from ringworld_model.packing import Example, pack_row
from ringworld_workers.data.files import DataError
from ringworld_workers.data.shard_cache import ShardCache
from ringworld_workers.data.shards import Dataset
from ringworld_workers.evaluate.row_loss import score_row
from ringworld_workers.evaluate.task import EvaluationRing, Item, Record, Subject


@dataclass(frozen=True)
class Document:
    """The beginning of one held-out document.

    Attributes:
        id: its source and its place there.
        name: what the source calls it.
        dataset: holds it.
        index: its place in the dataset.
        tokens: how many of it are taken, from its beginning.
    """

    id: str
    name: str
    dataset: Dataset
    index: int
    tokens: int

    def pieces(self, length: int) -> list[Example]:
        """Cut into pieces of this length; the last may be shorter.

        A piece's last target is the document's next token, so that every length predicts the same.
        """
        whole = self.dataset.read(self.index)
        starts = range(0, self.tokens, length)
        return [_cut(whole, start, min(start + length, self.tokens)) for start in starts]


def longest_documents(
    subject: Subject, mixture: Mapping[str, float], count: int, limit: int, task: str
) -> list[Document]:
    """The longest held-out documents of the sources without video; of all, where all have some.

    Args:
        subject: where the sources are.
        mixture: of which sources.
        count: documents at most.
        limit: tokens taken of each at most.
        task: for the message.

    Raises:
        DataError: there are none.
    """
    cache = ShardCache(subject.data.shard_cache.folder, subject.data.shard_cache.max_bytes)
    places = {subject.sources[name]: name for name in sorted(mixture, reverse=True)}
    opened = {name: Dataset(place, "held_out", cache) for place, name in places.items()}
    plain = {name: found for name, found in opened.items() if not _has_vision(found)}
    chosen = {name: found for name, found in (plain or opened).items() if len(found)}
    lengths = [
        (-int(length), name, index)
        for name, dataset in chosen.items()
        for index, length in enumerate(dataset.lengths)
    ]
    if not lengths:
        raise DataError(
            f"evaluate.{task}: none of the sources {', '.join(sorted(mixture))} holds documents "
            "out; name some in the recipe (held_out), or leave the task out"
        )
    return [
        Document(
            f"{name}/{chosen[name].row(index)}",
            chosen[name].name(index),
            chosen[name],
            index,
            min(-length, limit),
        )
        for length, name, index in sorted(lengths)[:count]
    ]


def piece_items(documents: Sequence[Document], lengths: Sequence[int]) -> list[Item]:
    """An item for each document and length of its pieces; the longest come first."""
    return [
        Item(
            f"{document.id}@{length}",
            {"document": document.name, "length": length, "tokens": document.tokens},
        )
        for length in sorted(lengths, reverse=True)
        for document in documents
    ]


def score_pieces(item: Item, documents: Sequence[Document], ring: EvaluationRing) -> Record:
    """Score one document in pieces of one length, side by side in one row."""
    wanted = item.id.rpartition("@")[0]
    document = next(document for document in documents if document.id == wanted)
    pieces = document.pieces(item.facts["length"])
    row: TrainBatch = pack_row(pieces, document.tokens, "token")
    loss = score_row(ring, row)
    return {"id": item.id, "nll": sum(loss.nll), "weight": sum(loss.weight)}


def losses_by_length(records: Sequence[Record]) -> dict[int, float]:
    """Nats per target at each length of pieces, shortest first."""
    sums: dict[int, list[float]] = {}
    for record in records:
        total = sums.setdefault(int(record["length"]), [0.0, 0.0])
        total[0] += record["nll"]
        total[1] += record["weight"]
    return {length: nll / weight for length, (nll, weight) in sorted(sums.items()) if weight > 0}


def _cut(example: Example, start: int, stop: int) -> Example:
    part = slice(start, stop)
    return Example(
        tokens=np.asarray(example.tokens[part]),
        modality=np.asarray(example.modality[part]),
        targets=np.asarray(example.targets[part]),
        target_modality=np.asarray(example.target_modality[part]),
        loss_mask=np.asarray(example.loss_mask[part]),
    )


def _has_vision(dataset: Dataset) -> bool:
    return int(dataset.meta["splits"]["train"]["vision_tokens"]) > 0
