"""What travels: enough for every rank, the same to sender and receiver, and no more than needed."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_model.ring import plan_ring
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.parcel import Load, add, empty_parcel, pack, unpack
from ringworld_model.ring.travel import count_rows


def rows_of(spans):
    assert all(start < stop for start, stop in spans)
    assert all(one[1] < other[0] for one, other in zip(spans, spans[1:], strict=False))
    return {row for start, stop in spans for row in range(start, stop)}


def needed(plan, rank, step):
    """Keys that the rank's rectangles touch: those that it must have."""
    return {row for _, _, k0, k1, _ in plan.rectangles(rank, step) for row in range(k0, k1)}


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 300), max_size=8),
    st.integers(0, 150),
    st.integers(1, 7),
    st.sampled_from(LAYOUTS),
)
def test_exactly_what_is_needed_travels(lengths, padding, size, layout):
    plan = plan_ring(lengths, max(1, sum(lengths) + padding), size, layout)
    travels = [plan.travel(rank) for rank in range(size)]
    for source in range(size):
        came, home = set(), set()
        for step in range(1, size):
            rank = (source + step) % size
            at = travels[rank]
            later = [needed(plan, (source + t) % size, t) for t in range(step, size)]
            assert rows_of(at.keys_in[step]) == set().union(*later)
            assert travels[rank - 1].keys_out[step - 1] == at.keys_in[step]
            assert travels[rank - 1].gradients_out[step - 1] == at.gradients_in[step]
            assert travels[source].home_in[step] == at.home_out[step]
            # Gradients: all that came before and this rank's go on or go home, each row once.
            assert rows_of(at.gradients_in[step]) == came
            added = came | later[0]
            came, leaves = rows_of(at.gradients_out[step]), rows_of(at.home_out[step])
            assert came | leaves == added and not came & leaves
            assert came <= set().union(*later[1:])
            assert not home & leaves
            home |= leaves
        assert not came
        assert home == set().union(*(needed(plan, (source + t) % size, t) for t in range(1, size)))
    for travel in travels:
        assert not any((travel.keys_in[0], travel.gradients_out[0], travel.home_out[0]))
        assert not travel.keys_out[size - 1] and not travel.gradients_out[size - 1]


def packed(num_documents, total, seed):
    cuts = sorted(random.Random(seed).sample(range(1, total), num_documents - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def sent(plan):
    """Shares of K/V and of gradient rows that are sent; R (R - 1) and R * R cuts are all."""
    travels = [plan.travel(rank) for rank in range(plan.ring_size)]
    keys = sum(count_rows(spans) for travel in travels for spans in travel.keys_out)
    gradients = sum(
        count_rows(spans)
        for travel in travels
        for spans in (*travel.gradients_out, *travel.home_out)
    )
    size, cut = plan.ring_size, plan.local_length
    return keys / (size * (size - 1) * cut), gradients / (size * size * cut)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_sends_more_than_everything(layout):
    keys, gradients = sent(plan_ring(packed(72, 65536, 1), 65536, 8, layout))
    assert keys <= 1 and gradients <= 1


def test_short_documents_send_half():
    plan = plan_ring(packed(72, 65536, 1), 65536, 8)
    assert plan.layout == "block_cyclic"
    keys, gradients = sent(plan)
    assert keys <= 0.65 and gradients <= 0.7
    # A document of one block is at home on one rank.
    alone = plan_ring([128] * 64, 8192, 8, "block_cyclic")
    assert sent(alone) == (0, 0)
    # Zigzag: the first rank's late half is seen by nobody else.
    keys, gradients = sent(plan_ring([65536], 65536, 8))
    assert keys < 0.95 and gradients < 0.8


def test_travel_is_cached_and_refuses_strange_ranks():
    plan = plan_ring([700, 33], 4096, 3)
    assert plan.travel(1) is plan.travel(1)
    with pytest.raises(ValueError, match="rank=3 is outside the ring of 3"):
        plan.travel(3)


def test_parcels_carry_the_rows_and_nothing_else():
    k, v = torch.arange(2 * 2 * 6 * 1 * 3.0).view(2, 2, 6, 1, 3).unbind(0)
    loads = [Load(slice(0, 1), ((1, 2), (4, 6))), Load(slice(1, 2), ())]
    parcel = pack((k, v), loads)
    assert parcel.shape == empty_parcel(k, loads).shape == (2 * 3 * 3,)
    room = torch.full_like(k, -1), torch.full_like(v, -1)
    for got, sent_ in zip(unpack(parcel, room, loads), (k, v), strict=True):
        expected = torch.full_like(sent_, -1)
        expected[0, [1, 4, 5]] = sent_[0, [1, 4, 5]]
        assert torch.equal(got, expected)
    total = torch.zeros_like(k), torch.zeros_like(v)
    add(parcel, total, loads)
    assert torch.equal(total[1][0, 4:], v[0, 4:]) and not total[1][1].any()
    # All rows, in one piece already: no copy; apart: one copy; both read back alike.
    complete = [Load(slice(0, 2), ((0, 6),))]
    whole = pack((k, v), complete)
    assert whole.data_ptr() == k.data_ptr()
    copied = pack((k.clone(), v.clone()), complete)
    assert torch.equal(whole, copied)
    assert torch.equal(unpack(copied, room, complete)[1], v)
