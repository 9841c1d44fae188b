"""The rows of one record batch, checked all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ringworld_model.batch import NUM_MODALITIES, TEXT, VISION


@dataclass(frozen=True, slots=True)
class Found:
    """Something wrong in a row.

    Attributes:
        row: in the batch.
        what: with the token's place in the row.
    """

    row: int
    what: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A record batch of R rows and T tokens.

    Attributes:
        offsets: int64 [R + 1], where each row's tokens begin.
        tokens: int32 [T].
        modality: uint8 [T].
        loss: uint8 [T].
        names: [R].
        targets: int32 [R, 2], counted targets by modality, as they were written.
        equal_offsets: whether the three columns of tokens are cut alike.
        lengths: int32 [R], what the length index says; None: it cannot be read.
        text_ids: of the text tokenizer.
        codes: of the codebook; 0 without one.
        codes_per_frame: of the codebook.
    """

    offsets: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    modality: npt.NDArray[np.uint8]
    loss: npt.NDArray[np.uint8]
    names: list[str]
    targets: npt.NDArray[np.int32]
    equal_offsets: bool
    lengths: npt.NDArray[np.int32] | None
    text_ids: int
    codes: int
    codes_per_frame: int

    @classmethod
    def of(
        cls,
        batch: pa.RecordBatch,
        meta: Mapping[str, Any],
        lengths: npt.NDArray[np.int32] | None,
    ) -> Batch:
        """Read a batch of a dataset."""
        columns = [batch.column(name) for name in ("tokens", "modality", "loss")]
        offsets = [column.offsets.to_numpy().astype(np.int64) for column in columns]
        codebook = meta["codebook"] or {"size": 0, "codes_per_frame": 0}
        return cls(
            offsets=offsets[0],
            tokens=columns[0].values.to_numpy(),
            modality=columns[1].values.to_numpy(),
            loss=columns[2].values.to_numpy(),
            names=batch.column("name").to_pylist(),
            targets=np.stack(
                [batch.column(name).to_numpy() for name in ("text_targets", "vision_targets")], 1
            ),
            equal_offsets=all(np.array_equal(offsets[0], other) for other in offsets[1:]),
            lengths=lengths,
            text_ids=int(meta["tokenizer"]["size"]),
            codes=int(codebook["size"]),
            codes_per_frame=int(codebook["codes_per_frame"]),
        )

    def place(self, token: int) -> tuple[int, int]:
        """Row of a token, and its place there."""
        row = int(np.searchsorted(self.offsets, token, side="right")) - 1
        return row, token - int(self.offsets[row])

    def add_to(self, totals: dict[str, int]) -> None:
        """Count what meta.json counts."""
        sizes = np.diff(self.offsets)
        totals["examples"] += len(sizes)
        totals["tokens"] += len(self.tokens)
        totals["text_tokens"] += int((self.modality == TEXT).sum())
        totals["vision_tokens"] += int((self.modality == VISION).sum())
        longest = totals["longest_example_tokens"]
        totals["longest_example_tokens"] = max(longest, int(sizes.max(initial=0)))


def check_batch(batch: Batch) -> Iterator[Found]:
    """Everything that is wrong; of each kind the first in every row."""
    if not batch.equal_offsets:
        yield Found(0, "tokens, modality and loss are not cut alike from this row on")
        return
    sizes = np.diff(batch.offsets)
    for row in np.flatnonzero(sizes < 2):
        yield Found(int(row), f"{sizes[row]} tokens; an example has two at least")
    if batch.lengths is not None:
        wrong = np.flatnonzero(sizes[: len(batch.lengths)] != batch.lengths[: len(sizes)])
        for row in wrong:
            yield Found(
                int(row), f"{sizes[row]} tokens, the length index says {batch.lengths[row]}"
            )
    vision = batch.modality == VISION
    ids = batch.tokens
    yield from _first_of_rows(
        batch,
        ~vision & ((ids < 0) | (ids >= batch.text_ids)),
        lambda t: f"text id {ids[t]} is not one of the tokenizer's {batch.text_ids}",
    )
    highest = batch.codes + 1
    yield from _first_of_rows(
        batch,
        vision & ((ids < 0) | (ids > highest)),
        lambda t: (
            f"vision id {ids[t]} is neither a code (below {batch.codes}), eof nor eov"
            if batch.codes
            else f"vision id {ids[t]} in a dataset without a codebook"
        ),
    )
    for name, values, most in (
        ("modality", batch.modality, NUM_MODALITIES),
        ("loss", batch.loss, 2),
    ):
        yield from _first_of_rows(
            batch,
            values >= most,
            lambda t, name=name, values=values: f"{name} {values[t]} is neither 0 nor 1",
        )
    yield from _check_framing(batch, vision)
    yield from _check_targets(batch)


def _first_of_rows(batch: Batch, wrong: npt.NDArray[np.bool_], what: Any) -> Iterator[Found]:
    seen = -1
    for token in np.flatnonzero(wrong):
        row, place = batch.place(int(token))
        if row != seen:
            yield Found(row, f"token {place}: {what(int(token))}")
        seen = row


def _check_framing(batch: Batch, vision: npt.NDArray[np.bool_]) -> Iterator[Found]:
    """Every clip is frames of codes that end in eof, the last in eov."""
    if not batch.codes or not vision.any():
        return
    # A clip ends where text or the next row begins.
    begins = vision.copy()
    begins[1:] &= ~vision[:-1]
    starts_of_rows = batch.offsets[:-1][np.diff(batch.offsets) > 0]
    begins[starts_of_rows] = vision[starts_of_rows]
    starts = np.flatnonzero(begins)
    edges = np.flatnonzero(begins | ~vision)
    stops = np.append(edges, len(vision))[np.searchsorted(edges, starts, side="right")]
    # Rows end clips too, also where the next row begins with text: ~vision is an edge there.
    stride, eof, eov = batch.codes_per_frame + 1, batch.codes, batch.codes + 1
    seen = -1
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        row, place = batch.place(start)
        if row == seen:
            continue
        problem = _framing(batch.tokens[start:stop], stride, eof, eov)
        if problem:
            seen = row
            yield Found(row, f"token {place}: the clip that begins here {problem}")


def _framing(ids: npt.NDArray[np.int32], stride: int, eof: int, eov: int) -> str:
    if len(ids) % stride:
        return f"has {len(ids)} tokens, which are not whole frames of {stride - 1} codes + 1 end id"
    frames = ids.reshape(-1, stride)
    inside = frames[:, :-1] >= eof
    if inside.any():
        frame = int(np.flatnonzero(inside.any(axis=1))[0])
        return f"has an end id inside frame {frame}"
    expected = np.full(len(frames), eof, np.int32)
    expected[-1] = eov
    wrong = np.flatnonzero(frames[:, -1] != expected)
    # A clip may follow another at once: eov, and the next frame is a new clip's first.
    wrong = wrong[(frames[wrong, -1] != eov) | (wrong == len(frames) - 1)]
    if len(wrong):
        return f"ends frame {wrong[0]} in id {frames[wrong[0], -1]}, expected {expected[wrong[0]]}"
    return ""


def _check_targets(batch: Batch) -> Iterator[Found]:
    counted = (batch.loss != 0).astype(np.int64)
    filled = np.diff(batch.offsets) > 0
    counted[batch.offsets[:-1][filled]] = 0  # nobody predicts a row's first token
    for modality, name in ((TEXT, "text"), (VISION, "vision")):
        sums = np.concatenate([[0], np.cumsum(counted * (batch.modality == modality))])
        found = np.diff(sums[batch.offsets])
        for row in np.flatnonzero(found != batch.targets[:, modality]):
            yield Found(
                int(row),
                f"{found[row]} {name} targets, {name}_targets says {batch.targets[row, modality]}",
            )
