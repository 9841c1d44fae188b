import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_model.ring.merge import merge_


def softmax_part(scores, values):
    """(out, lse) of one set of keys; no key gives (0, -inf)."""
    if scores.shape[-1] == 0:
        return torch.zeros(*scores.shape[:-1], values.shape[-1]).double(), torch.full(
            scores.shape[:-1], -torch.inf, dtype=torch.float64
        )
    return torch.softmax(scores, -1) @ values, torch.logsumexp(scores, -1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 2**31), st.floats(1, 300)
)
def test_merging_parts_is_the_softmax_of_the_whole(sizes, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    scores = torch.randn(1, 2, 3, total, generator=generator, dtype=torch.float64) * spread
    values = torch.randn(1, 2, total, 4, generator=generator, dtype=torch.float64)
    out = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    lse = torch.full((1, 2, 3), -torch.inf, dtype=torch.float64)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        merge_(out, lse, *softmax_part(scores[..., part], values[:, :, part]))
        start += size
    expected_out, expected_lse = softmax_part(scores, values)
    assert torch.allclose(out, expected_out, rtol=0, atol=1e-13)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert torch.allclose(lse, expected_lse, rtol=1e-14, atol=1e-13)


def test_rows_without_keys_stay_empty_and_add_nothing():
    out, lse = torch.zeros(1, 1, 2, 3), torch.tensor([[[-torch.inf, 0.5]]])
    out[:, :, 1] = 7.0
    merge_(out, lse, torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf))
    assert torch.equal(out, torch.tensor([[[[0.0] * 3, [7.0] * 3]]]))
    assert torch.equal(lse, torch.tensor([[[-torch.inf, 0.5]]]))


def test_the_first_block_is_taken_as_it_is():
    block_out, block_lse = torch.randn(1, 2, 5, 8).bfloat16(), torch.randn(1, 2, 5)
    out, lse = torch.zeros(1, 2, 5, 8), torch.full((1, 2, 5), -torch.inf)
    merge_(out, lse, block_out, block_lse)
    assert torch.equal(out, block_out.float()) and torch.equal(lse, block_lse)
