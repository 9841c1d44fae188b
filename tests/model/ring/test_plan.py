import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_model.ring import plan_ring, plan_rows
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.rectangle import Rectangle, cover_staircase


@st.composite
def rows(draw):
    lengths = draw(st.lists(st.integers(1, 300), max_size=8))
    padding = draw(st.integers(0, 150))
    return lengths, max(1, sum(lengths) + padding)


def segments(document_lengths, context_length, indices):
    """Segment of each index; padding of either kind is -1."""
    ids = torch.full((context_length,), -1)
    start = 0
    for document, length in enumerate(document_lengths):
        ids[start : start + length] = document
        start += length
    padded = torch.cat((ids, torch.tensor([-1])))
    return padded[indices.clamp(max=context_length)]


def visible(plan, rank, source):
    """The mask by definition: same document, key index <= query index."""
    q, k = plan.local_indices(rank), plan.local_indices(source)
    of_q = segments(plan.document_lengths, plan.context_length, q)
    of_k = segments(plan.document_lengths, plan.context_length, k)
    return (of_q[:, None] == of_k[None, :]) & (of_q >= 0)[:, None] & (q[:, None] >= k[None, :])


def covered(plan, rank, step):
    count = torch.zeros(plan.local_length, plan.local_length, dtype=torch.int64)
    for q0, q1, k0, k1, diagonal in plan.rectangles(rank, step):
        assert 0 <= q0 < q1 <= plan.local_length and 0 <= k0 < k1 <= plan.local_length
        ones = torch.ones(q1 - q0, k1 - k0, dtype=torch.int64)
        if diagonal:
            assert q1 - q0 == k1 - k0
            ones = ones.tril()
        count[q0:q1, k0:k1] += ones
    return count


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(1, 6), st.sampled_from((*LAYOUTS, "auto")))
def test_every_visible_pair_is_covered_once_and_counted(row, ring_size, layout):
    plan = plan_ring(*row, ring_size, layout)
    for rank in range(ring_size):
        for step in range(ring_size):
            expected = visible(plan, rank, (rank - step) % ring_size)
            assert torch.equal(covered(plan, rank, step), expected.to(torch.int64))
            assert plan.pairs[rank, step] == expected.sum()
            assert plan.pairs[rank, step] == sum(r.pairs for r in plan.rectangles(rank, step))


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(1, 9), st.sampled_from((*LAYOUTS, "auto")))
def test_local_indices_are_a_partition(row, ring_size, layout):
    plan = plan_ring(*row, ring_size, layout)
    parts = [plan.local_indices(rank) for rank in range(ring_size)]
    assert all(part.dtype == torch.int64 and len(part) == plan.local_length for part in parts)
    assert all((part.diff() > 0).all() for part in parts)
    everything = torch.cat(parts).sort().values
    assert torch.equal(everything, torch.arange(ring_size * plan.local_length))
    assert len(everything) >= row[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 7))
def test_a_staircase_is_covered_once(num_strips, rise, first_key):
    strips = [(3 * i, 3 * i + 3, first_key + rise * (i + 1)) for i in range(num_strips)]
    expected = torch.zeros(3 * num_strips, strips[-1][2], dtype=torch.int64)
    for q0, q1, k1 in strips:
        expected[q0:q1, first_key:k1] = 1
    found = list(cover_staircase(strips, first_key))
    for q0, q1, k0, k1, _ in found:
        expected[q0:q1, k0:k1] -= 1
    assert not expected.any()
    assert len(found) <= 1.25 * num_strips


def test_one_document_takes_few_calls():
    alone = plan_ring([16384], 16384, 1)
    assert alone.rectangles(0, 0) == (Rectangle(0, 16384, 0, 16384, True),)
    zigzag = plan_ring([16384], 16384, 2)
    assert zigzag.layout == "zigzag"
    assert all(len(zigzag.rectangles(rank, step)) == 1 for rank in (0, 1) for step in (0, 1))
    cyclic = plan_ring([16384], 16384, 2, "block_cyclic")
    assert len(cyclic.rectangles(1, 0)) == 1
    assert len(cyclic.rectangles(1, 1)) <= 80


def test_imbalance_of_known_layouts():
    # Contiguous, one document, 2 ranks: step 0 is even, in step 1 one rank does all the work.
    half = 2048
    plan = plan_ring([2 * half], 2 * half, 2, "contiguous")
    triangle, square = half * (half + 1) // 2, half * half
    assert plan.pairs.tolist() == [[triangle, 0], [triangle, square]]
    assert plan.step_imbalance == (1.0, 2.0)
    assert plan.imbalance == pytest.approx((triangle + square) * 2 / (2 * triangle + square))
    assert plan_ring([4096], 4096, 2, "zigzag").imbalance == 1.0
    assert plan_ring([], 64, 4).imbalance == 1.0


def packed(num_documents, total, seed):
    cuts = sorted(random.Random(seed).sample(range(1, total), num_documents - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def test_auto_balances_packed_documents():
    lengths = packed(72, 65536, seed=1)
    plan = plan_ring(lengths, 65536, 8)
    assert plan.layout == "block_cyclic"
    assert plan.imbalance <= 1.12
    assert plan_ring(lengths, 65536, 8, "zigzag").imbalance > 1.5


def test_auto_takes_the_least_counted_cost():
    for lengths in ([4096], packed(30, 4096, 2), [100, 3000], [1] * 500):
        costs = {layout: plan_ring(lengths, 4096, 3, layout)._cost for layout in LAYOUTS}
        assert costs[plan_ring(lengths, 4096, 3).layout] == min(costs.values())


def test_rows_of_a_batch_share_a_layout():
    batch = [[1000], packed(20, 1000, 3), []]
    plans = plan_rows(batch, 1000, 3)
    assert len({plan.layout for plan in plans}) == 1
    assert len({plan.local_length for plan in plans}) == 1
    assert [plan.document_lengths for plan in plans] == [tuple(row) for row in batch]


def test_plans_are_cached_and_compare_by_content():
    plan = plan_ring([700, 33], 4096, 3, "zigzag")
    assert plan_ring((700, 33), 4096, 3, "zigzag") is plan
    assert plan_ring([700, 33], 4096, 3, "striped") != plan
    assert plan.rectangles(1, 2) is plan.rectangles(1, 2)


def test_planning_a_million_tokens_has_no_quadratic_loop():
    lengths = packed(1000, 1 << 20, seed=4)
    began = time.process_time()
    plan = plan_ring(lengths, 1 << 20, 64)
    for step in range(64):
        plan.rectangles(63, step)
    # About 0.1 s; a loop over tokens or over all ranks' rectangles takes many seconds.
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([10], 8, 1), r"document_lengths sum to 10, more than context_length=8"),
        (([4, 0], 8, 1), r"document_lengths\[1\]=0 is below 1"),
        (([4], 0, 1), r"context_length=0"),
        (([4], 8, 0), r"ring_size=0"),
        (([4], 8, 1, "snake"), r"attention.layout='snake' is unknown.*block_cyclic"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_ring(*arguments)


def test_ranks_and_steps_outside_the_ring_are_refused():
    plan = plan_ring([10], 10, 2)
    with pytest.raises(ValueError, match="rank=2 is outside the ring of 2"):
        plan.local_indices(2)
    with pytest.raises(ValueError, match="step=-1 is outside the ring of 2"):
        plan.rectangles(0, -1)
