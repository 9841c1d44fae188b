import time

import pytest
import torch

from ringworld_model.ring import plan_ring
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.tiles import key_table, query_table

CPU = torch.device("cpu")


def visible(plan, rank, step):
    """bool [queries, keys] and each query's document, -1 for padding."""
    place = range(plan.ring_size)
    queries, keys = (
        torch.cat(
            [
                plan.local_indices(one)
                for one in range(at * plan.heads_size, (at + 1) * plan.heads_size)
            ]
        )
        for at in (rank, place[rank - step])
    )
    ends = torch.tensor(plan.document_lengths).cumsum(0)

    def document(index):
        found = torch.searchsorted(ends, index, right=True)
        return torch.where(found < len(ends), found, -1)

    same = document(queries)[:, None] == document(keys)[None, :]
    mask = same & (queries[:, None] >= keys[None, :]) & (document(queries) >= 0)[:, None]
    return mask, document(queries), document(keys)


def check(table, mask, own_documents, other_documents):
    tokens = torch.arange(mask.shape[1])
    begin, end = table.ranges.to(torch.int64)
    ranged = (tokens >= begin[:, None]) & (tokens < end[:, None])
    assert torch.equal(ranged, mask)
    seen = torch.zeros(mask.shape, dtype=torch.int64)
    weights = []
    for tile, full_begin, full_end, low, high, first, mixed, last in table.visits.tolist():
        own = slice(tile * table.tile, (tile + 1) * table.tile)
        for other in range(full_begin, full_end):
            part = (own, slice(other * table.other, (other + 1) * table.other))
            assert mask[part].shape == (table.tile, table.other) and mask[part].all()
            seen[part] += 1
        for at, other in enumerate(table.masked[first:last].tolist(), first):
            part = (own, slice(other * table.other, (other + 1) * table.other))
            assert mask[part].any()
            seen[part] += 1
            columns = (tokens >= low) & (tokens < high)
            assert columns[part[1]][mask[part].any(0)].all()
            documents = set(own_documents[own].tolist()) - {-1}
            assert (at >= mixed) == (len(documents) > 1)
            if len(documents) == 1:
                read = other_documents[part[1]][columns[part[1]]]
                assert set(read.tolist()) == documents
        weights.append(2 * (full_end - full_begin) + 3 * (last - first))
    assert (seen[mask] == 1).all()
    assert seen.max() <= 1
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("lengths", "context_length", "ring_size", "heads_size"),
    [
        ((300, 1, 127, 128, 129, 5, 5, 90), 800, 3, 1),
        ((700,), 700, 1, 1),
        ((3,) * 40 + (200,), 350, 2, 2),
        ((), 50, 2, 1),
    ],
)
def test_tables_visit_every_visible_pair_once(
    layout, lengths, context_length, ring_size, heads_size
):
    plan = plan_ring(lengths, context_length, ring_size, layout, heads_size=heads_size)
    for rank in range(ring_size):
        for step in range(ring_size):
            mask, queries, keys = visible(plan, rank, step)
            for shape in ((32, 16), (16, 32)):
                table = query_table(plan, rank, step, shape, CPU)
                check(table, mask, queries, keys)
                if step == 0:
                    # Step 0 writes out: every tile of queries has its turn.
                    assert len(table.visits) == -(-len(mask) // shape[0])
                check(key_table(plan, rank, step, shape, CPU), mask.T, keys, queries)


def test_a_dense_row_masks_its_diagonal_only():
    plan = plan_ring([1024], 1024, 1, "contiguous")
    table = query_table(plan, 0, 0, (128, 128), CPU)
    assert sorted(table.masked.tolist()) == list(range(8))
    assert table.visits[:, 0].tolist() == list(range(7, -1, -1))
    assert table.area == 36 * 128 * 128
    assert query_table(plan, 0, 0, (128, 128), CPU) is table


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_tables_of_a_million_tokens_are_cheap(one_thread):
    plan = plan_ring([1048] * 1000, 1 << 20, 64, "block_cyclic")
    spent = []
    for step in range(8):
        began = time.thread_time()
        query_table(plan, 63, step, (128, 128), CPU)
        key_table(plan, 63, step, (128, 64), CPU)
        spent.append(time.thread_time() - began)
    assert min(spent) <= 0.010, spent
