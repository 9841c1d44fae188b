"""What is cut for the ranks of a ring comes back whole."""

from __future__ import annotations

import pytest
import torch

from ringworld_model.batch import TENSOR_FIELDS, TrainBatch, cut, restore
from ringworld_model.packing import Example, pack_row, stack_rows
from ringworld_model.ring import plan_ring
from ringworld_model.ring.layout import LAYOUTS


def rows_of(examples: list[Example], length: int) -> TrainBatch:
    return stack_rows(
        [
            pack_row(examples, length, "example"),
            pack_row(examples[1:2] * 3, length, "token"),
        ]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [97, 640])
def test_cut_then_restore(
    examples: list[Example], layout: str, ring_size: int, length: int
) -> None:
    batch = rows_of(examples, length)
    plans = [
        plan_ring(
            document_lengths=list(lengths),
            context_length=length,
            ring_size=ring_size,
            layout=layout,
        )
        for lengths in batch.document_lengths
    ]
    shares = [cut(batch, plans, rank) for rank in range(ring_size)]
    assert {share.tokens.shape for share in shares} == {(2, plans[0].local_length)}
    whole = restore(shares, plans)
    for name in TENSOR_FIELDS:
        before, after = getattr(batch, name), getattr(whole, name)
        assert before.dtype == after.dtype, name
        assert torch.equal(before, after), name
    assert whole.document_lengths == batch.document_lengths
    # What the layout adds carries no loss: the shares hold the rows' weight and no more.
    total = sum(share.loss_weights.double().sum() for share in shares)
    assert total == pytest.approx(batch.loss_weights.double().sum())


def test_plans_that_do_not_fit_are_refused(examples: list[Example]) -> None:
    batch = rows_of(examples, 97)
    plan = plan_ring(document_lengths=[97], context_length=97, ring_size=2, layout="contiguous")
    longer = plan_ring(document_lengths=[98], context_length=98, ring_size=2, layout="contiguous")
    with pytest.raises(ValueError, match="1 ring plans for 2 rows"):
        cut(batch, [plan], 0)
    with pytest.raises(ValueError, match=r"plans\[1\].context_length=98 but the rows hold 97"):
        cut(batch, [plan, longer], 0)
    with pytest.raises(ValueError, match="1 shares for a ring of 2"):
        restore([cut(batch, [plan, plan], 0)], [plan, plan])


def test_to_moves_every_tensor(examples: list[Example]) -> None:
    batch = rows_of(examples, 97)
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in TENSOR_FIELDS)
    assert moved.document_lengths == batch.document_lengths
