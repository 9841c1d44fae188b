"""Examples into packed rows: segment ids, positions that restart, and loss weights.

A packed row trains as its examples would alone: no token sees another example (segment_ids), RoPE
starts anew in each (position_ids), and in ``example`` mode each weighs the same however many
targets it has (see ``example_weights`` for those that are cut). LWM's paper trains so; its release
masks nothing and weighs by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ringworld_model.batch import NUM_MODALITIES, TENSOR_FIELDS, TrainBatch

WeightMode = Literal["token", "example"]


@dataclass(frozen=True)
class Example:
    """One document or clip, or a piece of one; n tokens.

    Attributes:
        tokens: int32 [n].
        modality: uint8 [n], 0 text, 1 vision.
        targets: int32 [n], what each position predicts: the next token.
        target_modality: uint8 [n].
        loss_mask: uint8 [n], 1 where the prediction counts.
        whole_targets: counted targets of text and of vision in the whole example that this is a
            piece of; empty: this is all of it.
    """

    tokens: NDArray[np.int32]
    modality: NDArray[np.uint8]
    targets: NDArray[np.int32]
    target_modality: NDArray[np.uint8]
    loss_mask: NDArray[np.uint8]
    whole_targets: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse arrays of unequal length.

        Raises:
            ValueError: names the array and both lengths.
        """
        for name in ("modality", "targets", "target_modality", "loss_mask"):
            length = len(getattr(self, name))
            if length != len(self.tokens):
                raise ValueError(
                    f"example.{name} has {length} entries for {len(self.tokens)} tokens; "
                    "every array of an example has one entry a token"
                )

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


def example_weights(
    example: Example, weight_mode: WeightMode, context_length: int
) -> NDArray[np.float32]:
    """Loss weight of each position of one example, or of one piece of it.

    ``token`` gives every target 1. ``example`` gives each target ``1 / min(N, context_length)``,
    where N counts the targets of its modality in the whole example. So the targets of an example
    that fits a row sum to 1 in each modality, wherever packing may have cut it, and ``sum(w * nll)
    / sum(w)`` over a batch is the mean over examples of each one's mean. A document longer than the
    context fills several rows however it is laid out; unpacked, each of those rows would be an
    example. It therefore counts as the rows that it fills: not as one, which would let a caption
    outweigh a novel, and not as its pieces, which would let a scrap that fills a gap weigh as much
    as a whole row.

    Args:
        example: n tokens.
        weight_mode: see above.
        context_length: tokens of a row.

    Returns:
        float32 [n].

    Raises:
        ValueError: unknown weight_mode.
    """
    if weight_mode not in ("token", "example"):
        raise ValueError(f"weight_mode={weight_mode!r} is unknown; use token or example")
    weights = (example.loss_mask != 0).astype(np.float32)
    if weight_mode == "example":
        for modality in range(NUM_MODALITIES):
            counted = (weights != 0) & (example.target_modality == modality)
            targets = (
                int(counted.sum())
                if example.whole_targets is None
                else example.whole_targets[modality]
            )
            weights[counted] = 1.0 / max(1, min(targets, context_length))
    return weights


def pack_row(
    examples: Sequence[Example], context_length: int, weight_mode: WeightMode
) -> TrainBatch:
    """Lay examples one after another in a row; the rest is padding.

    Args:
        examples: at least one token each, together at most context_length tokens.
        context_length: tokens of the row.
        weight_mode: see ``example_weights``.

    Returns:
        A batch of one row, tensors [1, context_length].

    Raises:
        ValueError: an empty example, or more tokens than the row holds.
    """
    lengths = tuple(len(example) for example in examples)
    if 0 in lengths:
        raise ValueError(f"examples[{lengths.index(0)}] has no tokens; drop empty examples")
    used = sum(lengths)
    if used > context_length:
        raise ValueError(
            f"{len(lengths)} examples of {used} tokens exceed context_length={context_length}; "
            "cut them before packing"
        )
    row: dict[str, NDArray[Any]] = {
        "tokens": np.zeros(context_length, np.int64),
        "targets": np.zeros(context_length, np.int64),
        "modality": np.zeros(context_length, np.uint8),
        "target_modality": np.zeros(context_length, np.uint8),
        "segment_ids": np.zeros(context_length, np.int32),
        "position_ids": np.zeros(context_length, np.int32),
        "loss_weights": np.zeros(context_length, np.float32),
    }
    start = 0
    for segment, example in enumerate(examples, start=1):
        here = slice(start, start + len(example))
        row["tokens"][here] = example.tokens
        row["targets"][here] = example.targets
        row["modality"][here] = example.modality
        row["target_modality"][here] = example.target_modality
        row["segment_ids"][here] = segment
        row["position_ids"][here] = np.arange(len(example))
        row["loss_weights"][here] = example_weights(example, weight_mode, context_length)
        start += len(example)
    tensors = {name: torch.from_numpy(array)[None] for name, array in row.items()}
    return TrainBatch(**tensors, document_lengths=(lengths,))


def stack_rows(rows: Sequence[TrainBatch]) -> TrainBatch:
    """Batches of equal length, one under another.

    Raises:
        ValueError: no rows, or rows of unequal length.
    """
    lengths = sorted({row.tokens.shape[1] for row in rows})
    if len(lengths) != 1:
        raise ValueError(f"rows of lengths {lengths} cannot be stacked; pack them to one length")
    tensors = {name: torch.cat([getattr(row, name) for row in rows]) for name in TENSOR_FIELDS}
    documents = tuple(document for row in rows for document in row.document_lengths)
    return TrainBatch(**tensors, document_lengths=documents)
