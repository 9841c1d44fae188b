"""What travels: enough for every rank, the same to sender and receiver, and no more than needed."""

import random
from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_model.ring import plan_ring
from ringworld_model.ring.backend import ring_kernel
from ringworld_model.ring.kernel import RowGroup
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.parcel import Load, Pool, add, as_pair, empty_parcel, pack, unpack
from ringworld_model.ring.reference import dense_attention
from ringworld_model.ring.spans import Spans


def rows_of(spans):
    assert all(start < stop for start, stop in spans)
    assert all(one[1] < other[0] for one, other in pairwise(spans))
    rows = [row for start, stop in spans for row in range(start, stop)]
    assert spans.rows == len(rows) and spans.index(torch.device("cpu")).tolist() == rows
    return set(rows)


def spans_of(*ranges):
    return Spans(torch.tensor(ranges, dtype=torch.int64).view(-1, 2))


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


def relay(plan, q, k, v, grad_out):
    """out, dq, dk, dv of whole rows, moving between ranks what the travel tables say, and no more.

    All ranks do a step, then all parcels are delivered; what none holds is NaN.
    """
    size, scale, rows = plan.ring_size, q.shape[-1] ** -0.5, [RowGroup(slice(0, 1), plan)]
    kernel, travels = ring_kernel("cpu"), [plan.travel(rank) for rank in range(size)]
    held = [plan.local_indices(rank) for rank in range(size)]
    padding = size * plan.local_length - plan.context_length
    whole = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v, grad_out)]
    cut_q, cut_k, cut_v, cut_grad = ([x[:, part] for part in held] for x in whole)
    own = [torch.stack((k, v)) for k, v in zip(cut_k, cut_v, strict=True)]

    def deliver(parcels, way, step):
        """What every rank gets from the one before it, at the rows that this one sends."""
        arrived = [torch.full_like(parcel, torch.nan) for parcel in parcels]
        for rank, parcel in enumerate(parcels):
            for start, stop in getattr(travels[rank], way)[step]:
                arrived[(rank + 1) % size][:, :, start:stop] = parcel[:, :, start:stop]
        return arrived

    def visits():
        keys = own
        for step in range(size):
            yield step, keys
            keys = deliver(keys, "keys_out", step)

    forward = [kernel.forward(rank, rows, cut_q[rank], scale) for rank in range(size)]
    for step, keys in visits():
        for one, kv in zip(forward, keys, strict=True):
            one.step(step, *kv)
    outs, lses = zip(*(one.finish() for one in forward), strict=True)
    backward = [
        kernel.backward(rank, rows, cut_grad[rank], cut_q[rank], outs[rank], lses[rank], scale)
        for rank in range(size)
    ]
    totals = [torch.zeros_like(kv) for kv in own]
    riding = totals
    for step, keys in visits():
        shares = totals if step == 0 else [torch.zeros_like(kv) for kv in own]
        for rank, one in enumerate(backward):
            one.step(step, *keys[rank], *shares[rank])
        if step == 0:
            continue
        for rank, share in enumerate(shares):
            for start, stop in travels[rank].gradients_in[step]:
                share[:, :, start:stop] += riding[rank][:, :, start:stop]
        for rank, share in enumerate(shares):
            home = (rank - step) % size
            posted = torch.full_like(share, torch.nan)
            for start, stop in travels[rank].home_out[step]:
                posted[:, :, start:stop] = share[:, :, start:stop]
            for start, stop in travels[home].home_in[step]:
                totals[home][:, :, start:stop] += posted[:, :, start:stop]
        riding = deliver(shares, "gradients_out", step)
    order = torch.cat(held).argsort()[: plan.context_length]
    dk, dv = torch.cat(totals, 2)[:, :, order]
    dqs = [one.finish() for one in backward]
    return torch.cat(outs, 1)[:, order], torch.cat(dqs, 1)[:, order], dk, dv


def wrong(plan):
    """The largest error of ``relay`` in fp64, infinite where a row that is needed is missing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(1, plan.context_length, heads, 16, generator=generator, dtype=torch.float64)
        for heads in (2, 1, 1, 2)
    )
    got = relay(plan, q, k, v, grad_out)
    segments = torch.zeros(1, plan.context_length, dtype=torch.int32)
    ends = [0, *accumulate(plan.document_lengths)]
    for document, (start, stop) in enumerate(pairwise(ends), start=1):
        segments[:, start:stop] = document
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = dense_attention(q, k, v, segments)
    wanted = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]
    return max(
        ((a - b).abs().max().nan_to_num(torch.inf).item()) for a, b in zip(got, wanted, strict=True)
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 250), max_size=6),
    st.integers(0, 100),
    st.integers(1, 9),
    st.sampled_from(LAYOUTS),
)
def test_what_travels_suffices(lengths, padding, size, layout):
    assert wrong(plan_ring(lengths, max(1, sum(lengths) + padding), size, layout)) <= 1e-12


@pytest.mark.parametrize(
    ("way", "layout"),
    [
        ("keys_out", "block_cyclic"),
        ("gradients_in", "block_cyclic"),
        ("gradients_out", "block_cyclic"),
        ("home_out", "block_cyclic"),
        ("home_in", "block_cyclic"),
        ("keys_out", "document_zigzag"),
        ("gradients_out", "document_zigzag"),
    ],
)
def test_a_missing_row_is_noticed(way, layout):
    plan = plan_ring([900, 1, 129], 1040, 4, layout)
    right = plan.travel(2)
    table = list(getattr(right, way))
    step = next(step for step, spans in enumerate(table) if spans)
    (start, stop), *rest = table[step]
    table[step] = spans_of((start + 1, stop), *rest)
    broken = right._replace(**{way: tuple(table)})
    with mock.patch.dict(plan._travels, {2: broken}):
        assert wrong(plan) > 1e-3
    assert wrong(plan) <= 1e-12


def packed(num_documents, total, seed):
    cuts = sorted(random.Random(seed).sample(range(1, total), num_documents - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def sent(plan):
    """Shares of K/V and of gradient rows that are sent; R (R - 1) and R * R cuts are all."""
    travels = [plan.travel(rank) for rank in range(plan.ring_size)]
    keys = sum(spans.rows for travel in travels for spans in travel.keys_out)
    gradients = sum(
        spans.rows for travel in travels for spans in (*travel.gradients_out, *travel.home_out)
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
    loads = [Load(slice(0, 1), spans_of((1, 2), (4, 6))), Load(slice(1, 2), spans_of())]
    parcel = pack((k, v), loads)
    assert parcel.shape == empty_parcel(k, k.dtype, loads).shape == (2 * 3 * 3,)
    room = torch.full_like(k, -1), torch.full_like(v, -1)
    for got, sent_ in zip(unpack(parcel, room, loads), (k, v), strict=True):
        expected = torch.full_like(sent_, -1)
        expected[0, [1, 4, 5]] = sent_[0, [1, 4, 5]]
        assert torch.equal(got, expected)
    total = torch.zeros_like(k), torch.zeros_like(v)
    add(parcel, total, loads)
    assert torch.equal(total[1][0, 4:], v[0, 4:]) and not total[1][1].any()
    # All rows, in one piece already: no copy; apart: one copy; both read back alike.
    complete = [Load(slice(0, 2), spans_of((0, 6)))]
    whole = pack((k, v), complete)
    assert whole.data_ptr() == k.data_ptr()
    copied = pack((k.clone(), v.clone()), complete)
    assert torch.equal(whole, copied)
    assert torch.equal(unpack(copied, room, complete)[1], v)


@pytest.mark.parametrize("apart", [2, 40])
def test_many_spans_travel_as_few_do(apart):
    # Of 200 tokens: 100 spans of one row, more than are copied one by one; and 5 of 20.
    spans = spans_of(*((start, start + apart // 2) for start in range(0, 200, apart)))
    rows = spans.index(torch.device("cpu"))
    # Two rows of the batch, and some of the heads: not contiguous.
    k, v, total_k, total_v = torch.randn(4, 3, 200, 4, 2)[:, :, :, 1:3].unbind(0)
    loads = [Load(slice(0, 2), spans), Load(slice(2, 3), spans_of((7, 9)))]
    parcel = pack((k, v), loads)
    assert torch.equal(parcel[: 2 * 100 * 4].view(2, 100, 2, 2), k[:2, rows])
    room = torch.full_like(k, -1), torch.full_like(v, -1)
    before = total_v.clone()
    unpack(parcel, room, loads)
    add(parcel, (total_k, total_v), loads)
    expected, added = torch.full_like(v, -1), before.clone()
    for part, of in ((slice(0, 2), rows), (slice(2, 3), torch.tensor([7, 8]))):
        expected[part, of] = v[part, of]
        added[part, of] = before[part, of] + v[part, of]
    assert torch.equal(room[1], expected) and torch.equal(total_v, added)


def test_a_pool_lends_what_was_given_back():
    like, dtype = torch.zeros(2, 3, 1, 4), torch.float64
    pool = Pool(like, dtype)
    first, second, third = (pool.take(like, dtype) for _ in range(3))
    assert first.dtype == torch.float64 and first.numel() == second.numel() == 2 * like.numel()
    # None overlaps another.
    for fill, lent in enumerate((first, second, third)):
        lent.fill_(fill)
    assert [lent.unique().tolist() for lent in (first, second, third)] == [[0], [1], [2]]
    # A parcel is a part of what was lent, a pair the whole of it; either gives all of it back.
    pool.give(third)
    parcel = empty_parcel(like, dtype, [Load(slice(0, 2), spans_of((1, 3)))], pool)
    assert parcel.data_ptr() == third.data_ptr()
    pool.give(parcel, None, like.new_empty(0), as_pair(second, like)[0], as_pair(first, like)[1])
    again = {pool.take(like, dtype).data_ptr() for _ in range(3)}
    assert again == {first.data_ptr(), second.data_ptr(), third.data_ptr()}
    # What is smaller finds room, too, and what is narrower gives all of the room back.
    pool.give(second)
    small = pool.take(like[:, :2], torch.bfloat16)
    assert small.data_ptr() == second.data_ptr() and small.numel() == 2 * like[:, :2].numel()
    pool.give(as_pair(small, like[:, :2])[1])
    assert pool.take(like, dtype).data_ptr() == second.data_ptr()
