"""From the results of a dataset's tasks to its shards, in the order of the items."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringworld_workers.data.draft import Refused
from ringworld_workers.data.files import DataError
from ringworld_workers.data.shard_format import FORMAT_VERSION, META_FILE, SPLITS, Split
from ringworld_workers.data.shard_writer import ShardWriter
from ringworld_workers.data.statistics import TargetCounts
from ringworld_workers.data.task_files import (
    Rows,
    read_digests,
    read_report,
    read_rows,
)
from ringworld_workers.data.vocabulary import Vocabulary

REFUSED_FILE = "refused.jsonl"
"""Beside a dataset's meta.json: what could not be used, a line each, with its name and reason."""
DUPLICATE = "examples equal to an earlier one"
_SHOWN = 5


def assemble(
    folder: Path,
    places: Sequence[Path],
    vocabulary: Vocabulary,
    meta: Mapping[str, Any],
    *,
    deduplicate: bool,
    on_place: Callable[[int], None],
) -> None:
    """Write a dataset: shards, refused.jsonl, meta.json.

    Args:
        folder: of the dataset; empty.
        places: examples of its tasks, in order.
        vocabulary: what the ids mean.
        meta: what is known of the dataset beforehand; ``name`` is its name.
        deduplicate: keep the first of equal examples.
        on_place: called with the number of tasks written so far.

    Raises:
        DataError: not one training example is left.
    """
    keep = _first_of_equals(places) if deduplicate else None
    counts = {
        split: TargetCounts(vocabulary.tokenizer["size"], vocabulary.num_vision_ids)
        for split in SPLITS
    }
    refused: list[Refused] = []
    num_refused = 0
    left_out: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(folder, split)) for split in SPLITS}
        refused_file = stack.enter_context((folder / REFUSED_FILE).open("w", encoding="utf-8"))
        for number, place in enumerate(places, start=1):
            report = read_report(place)
            num_refused += len(report.refused)
            refused += report.refused[: _SHOWN - len(refused)]
            left_out.update(report.left_out)
            for entry in report.refused:
                line = {"name": entry.name, "reason": entry.reason}
                refused_file.write(json.dumps(line, ensure_ascii=False) + "\n")
            first = 0
            for rows in read_rows(place):
                kept = np.ones(len(rows.names), bool)
                if keep is not None:
                    kept = keep[number - 1][first : first + len(rows.names)]
                    first += len(rows.names)
                    left_out[DUPLICATE] += int((~kept).sum())
                _write(writers, counts, rows, kept)
            on_place(number)
    if counts["train"].examples == 0:
        raise DataError(_nothing_left(str(meta["name"]), num_refused, refused, left_out))
    content = {
        "format": FORMAT_VERSION,
        **meta,
        **vocabulary.meta(),
        "splits": {
            split: {**counts[split].summary(), "shards": writers[split].entries()}
            for split in SPLITS
        },
        "left_out": {reason: number for reason, number in sorted(left_out.items()) if number},
        "refused": num_refused,
        "held_out_entropy_nats": counts["held_out"].entropy(),
        "train_unigram_counts": {
            name: numbers.tolist() for name, numbers in counts["train"].counts.items()
        },
    }
    (folder / META_FILE).write_text(json.dumps(content), encoding="utf-8")


def _first_of_equals(places: Sequence[Path]) -> list[npt.NDArray[np.bool_]]:
    """For each task, which of its examples are the first of their kind: 16 bytes an example."""
    digests = [read_digests(place) for place in places]
    joined = np.concatenate([np.zeros((0, 2), np.uint64), *digests])
    # Stable: of equals, the earlier stays before the later.
    order = np.lexsort((joined[:, 1], joined[:, 0]))
    ordered = joined[order]
    first = np.ones(len(joined), bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.split(first, np.cumsum([len(part) for part in digests])[:-1]) if digests else []


def _write(
    writers: Mapping[Split, ShardWriter],
    counts: Mapping[Split, TargetCounts],
    rows: Rows,
    kept: npt.NDArray[np.bool_],
) -> None:
    stops = np.cumsum(rows.lengths)
    starts = stops - rows.lengths
    for split in SPLITS:
        chosen = kept & (rows.held_out == (split == "held_out"))
        if not chosen.any():
            continue
        for index in np.flatnonzero(chosen):
            piece = slice(int(starts[index]), int(stops[index]))
            writers[split].add(
                rows.tokens[piece], rows.modality[piece], rows.loss[piece], rows.names[index]
            )
        tokens, modality, loss = rows.tokens, rows.modality, rows.loss
        if not chosen.all():
            mask = np.repeat(chosen, rows.lengths)
            tokens, modality, loss = tokens[mask], modality[mask], loss[mask]
        counts[split].add(tokens, modality, loss, rows.lengths[chosen])


def _nothing_left(
    name: str, number: int, refused: Sequence[Refused], left_out: Mapping[str, int]
) -> str:
    shown = "; ".join(f"{entry.name}: {entry.reason}" for entry in refused)
    more = f"; and {number - len(refused)} more" if number > len(refused) else ""
    counted = ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number)
    return (
        f"datasets.{name}: no training example is left (refused: {shown or 'none'}{more}; "
        f"left out: {counted or 'none'}); correct the files, or relax held_out and the lengths "
        f"that are kept"
    )
