"""The whole model over a ring gives the loss and the gradients of one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_models import SMALL

from ringworld_model.batch import TrainBatch, cut, restore
from ringworld_model.loss import combine
from ringworld_model.packing import Example, pack_row, stack_rows
from ringworld_model.ring import RingContext, plan_ring
from ringworld_model.tokens import clip_example, text_example
from ringworld_model.transformer import WorldModel, init_weights

LENGTH = 601
Found = tuple[float, dict[str, torch.Tensor]]


def rows() -> TrainBatch:
    """Two rows of 601 tokens; a contiguous cut leaves rank 0 without a vision target."""
    rng = np.random.default_rng(0)
    texts = [text_example(rng.integers(0, 40, n)) for n in (170, 131, 3)]
    clips = [
        clip_example(
            rng.integers(0, 40, words),
            rng.integers(0, 32, (frames, 6)),
            layout="text,vision",
            start_ids=[1, 2],
            end_ids=[3],
            codebook_size=32,
        )
        for words, frames in ((30, 30), (20, 2))
    ]
    return stack_rows(
        [
            pack_row([*texts, clips[0], clips[1]], LENGTH, "example"),
            pack_row([texts[0], texts[0], clips[0]], LENGTH, "example"),
        ]
    )


def run(
    mode: str,
    layout: str,
    dtype: torch.dtype,
    rank: int,
    world_size: int,
    group: object,
    split: tuple[int, object, object] | None = None,
) -> tuple[Found, list[int]]:
    """Loss and gradients summed over the ring, and this rank's number of targets.

    ``split``: ranks of a ring place, this rank's ring and its heads group; a plain ring where None.
    """
    heads_size, ring_group, heads_group = split or (1, group, None)
    batch = rows()
    plans = [
        plan_ring(
            document_lengths=list(lengths),
            context_length=LENGTH,
            ring_size=world_size // heads_size,
            layout=layout,
            heads_size=heads_size,
        )
        for lengths in batch.document_lengths
    ]
    model = WorldModel(SMALL, rope_theta=1e6, activation_checkpointing=mode, loss_tile_tokens=64)
    init_weights(model, 0)
    model.to(dtype)
    context = RingContext(plans=plans, group=ring_group, heads_group=heads_group)
    shares = [cut(batch, plans, other) for other in range(world_size)]
    assert torch.equal(restore(shares, plans).tokens, batch.tokens)
    sums = model(shares[rank], context)
    weights = batch.loss_weights.double()
    vision = batch.target_modality == 1
    total = torch.stack([weights[~vision].sum(), weights[vision].sum()])
    loss = combine(sums, total, (0.5, 0.5))
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    if group is not None:
        for value in found.values():
            dist.all_reduce(value, group=group)
    return (found.pop("loss").item(), found), sums.count.tolist()


CASES = [
    ("none", "block_cyclic", torch.float64),
    ("attention_saved", "zigzag", torch.float64),
    ("none", "document_zigzag", torch.float64),
    ("full", "contiguous", torch.float64),
    ("none", "striped", torch.float32),
    ("full", "auto", torch.float32),
]


def on_a_ring(rank: int, world_size: int) -> list[tuple[Found, list[int]]]:
    return [run(*case, rank, world_size, dist.group.WORLD) for case in CASES]


def on_a_grid(rank: int, world_size: int) -> list[tuple[Found, list[int]]]:
    """2 x 2 ranks, then all four at one place: the model has 4 query heads and 2 key heads."""
    rings = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    places = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    world = dist.group.WORLD
    splits = [(2, rings[rank % 2], places[rank // 2])] * 5 + [(4, None, world)]
    return [
        run(*case, rank, world_size, world, split)
        for case, split in zip(CASES, splits, strict=True)
    ]


@pytest.mark.parametrize(("place", "num_ranks"), [(on_a_ring, 2), (on_a_ring, 3), (on_a_grid, 4)])
def test_ring_equals_one_device(
    place: Callable[..., Any], num_ranks: int, run_gang: Callable[..., list[Any]]
) -> None:
    ranks = run_gang(place, num_ranks, timeout=50.0)
    for i, (mode, layout, dtype) in enumerate(CASES):
        case = f"{mode} {layout} {dtype}"
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        (loss, gradients), count = run("none", "contiguous", torch.float64, 0, 1, None)
        (ring_loss, ring_gradients), _ = ranks[0][i]
        counts = torch.tensor([ranks[rank][i][1] for rank in range(num_ranks)])
        assert counts.sum(0).tolist() == count, case
        if layout == "contiguous":
            assert counts[0, 1] == 0, "meant to show a rank without a vision target"
        assert ring_loss == pytest.approx(loss, rel=tolerance), case
        for name, gradient in gradients.items():
            error = (ring_gradients[name].double() - gradient).abs().max()
            assert error <= tolerance * gradient.abs().max(), f"{case}: {name}"


def documents() -> list[Example]:
    """Clips in both orders, texts, and a long document cut into three pieces."""
    rng = np.random.default_rng(5)

    def clip(words: int, frames: int, layout: str) -> Example:
        return clip_example(
            rng.integers(0, 40, words),
            rng.integers(0, 32, (frames, 6)),
            layout=layout,  # type: ignore[arg-type]
            start_ids=[1, 2],
            end_ids=[3],
            codebook_size=32,
        )

    long = rng.integers(0, 40, 150)
    whole_targets = (len(long) - 1, 0)
    pieces = [
        replace(text_example(long[start:stop], following), whole_targets=whole_targets)
        for start, stop, following in ((0, 90, long[90]), (90, 99, long[99]), (99, 150, None))
    ]
    texts = [text_example(rng.integers(0, 40, n)) for n in (2, 37, 29)]
    clips = [clip(12, 4, "text,vision"), clip(5, 3, "vision,text")]
    return [clips[0], pieces[1], texts[0], clips[1], pieces[0], texts[2], texts[1], pieces[2]]


PACKED_LENGTH = 120
PACKED_ROWS = (slice(0, 4), slice(4, 6), slice(6, 8))
PACKINGS = [
    (weights, layout, dtype)
    for weights in ("token", "example")
    for layout, dtype in (("auto", torch.float64), ("striped", torch.float32))
]


def packed_gradients(
    rows: TrainBatch, layout: str, dtype: torch.dtype, rank: int, ring_size: int, group: object
) -> dict[str, torch.Tensor]:
    """Loss and gradients, of the text loss and of the vision loss, summed over the ring."""
    plans = [
        plan_ring(list(lengths), PACKED_LENGTH, ring_size, layout)
        for lengths in rows.document_lengths
    ]
    weights = rows.loss_weights.double()
    vision = rows.target_modality == 1
    total = torch.stack([weights[~vision].sum(), weights[vision].sum()])
    found: dict[str, torch.Tensor] = {}
    for name, shares in (("text", (1.0, 0.0)), ("vision", (0.0, 1.0))):
        model = WorldModel(SMALL, rope_theta=1e6, loss_tile_tokens=64)
        init_weights(model, 0)
        model.to(dtype)
        sums = model(cut(rows, plans, rank), RingContext(plans=plans, group=group))
        loss = combine(sums, total, shares)
        loss.backward()
        found[f"{name} loss"] = loss.detach().clone()
        for parameter, value in model.named_parameters():
            found[f"{name} {parameter}"] = value.grad
    if group is not None:
        for value in found.values():
            dist.all_reduce(value, group=group)
    return found


def packed_on_a_ring(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    group = dist.group.WORLD if world_size > 1 else None
    found = []
    for weights, layout, dtype in PACKINGS:
        examples = documents()
        packed = [pack_row(examples[row], PACKED_LENGTH, weights) for row in PACKED_ROWS]
        found.append(packed_gradients(stack_rows(packed), layout, dtype, rank, world_size, group))
    return found


@pytest.mark.parametrize("ring_size", [1, 2, 3])
def test_packed_on_a_ring_equals_unpacked_on_one_device(
    ring_size: int, run_gang: Callable[..., list[Any]]
) -> None:
    """Packing must reproduce rows of one padded example each.

    In double precision to 1e-12 of the largest value, in single precision to 1e-6: on one device
    fp32 itself is 1.5e-6 of the largest value away from fp64 here, so a relative bound on it would
    measure rounding.
    """
    if ring_size == 1:
        packed = packed_on_a_ring(0, 1)
    else:
        packed = run_gang(packed_on_a_ring, ring_size, timeout=50.0)[0]
    for (weights, layout, dtype), found in zip(PACKINGS, packed, strict=True):
        rows = [pack_row([example], PACKED_LENGTH, weights) for example in documents()]
        expected = packed_gradients(stack_rows(rows), "contiguous", dtype, 0, 1, None)
        for name, value in expected.items():
            largest = value.abs().max()
            error = (found[name] - value).abs().max()
            bound = 1e-12 * largest if dtype == torch.float64 else 1e-6
            assert error <= bound, f"{weights} {layout} {name}: {error:.1e} of {largest:.1e}"
            # Each loss reaches every weight but the other modality's head.
            other = {"text": "vision_head", "vision": "text_head"}[name.split()[0]]
            assert (largest > 0) == (other not in name), name
