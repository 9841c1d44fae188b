"""Rings larger than the machine, and one document's influence on another, in one process."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_model.ring import plan_ring
from ringworld_model.ring.backend import ring_kernel
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.reference import dense_attention
from ringworld_model.ring.simulation import simulate

CPU = ring_kernel("cpu")


def inputs(length, heads, kv_heads, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, length, count, width, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def segments(lengths, context_length):
    ids = torch.zeros(1, context_length, dtype=torch.int32)
    real = torch.repeat_interleave(
        torch.arange(1, len(lengths) + 1), torch.tensor(lengths, dtype=torch.int64)
    )
    ids[0, : len(real)] = real.to(torch.int32)
    return ids


def check(plan, heads, kv_heads, width, seed=0):
    """The simulated ring of ``plan`` gives the oracle's out, dq, dk and dv."""
    length = plan.context_length
    q, k, v, grad_out = inputs(length, heads, kv_heads, width, torch.float64, seed)
    got = simulate(plan, q, k, v, grad_out, CPU)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = dense_attention(q, k, v, segments(plan.document_lengths, length))
    wanted = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        # Inputs are of order 1. Documents of one token have no dq and dk at all.
        error = ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()
        assert error <= 1e-12, f"{name}: {error:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("ring_size", "lengths", "context_length"),
    [(7, (1, 900, 128, 127), 1200), (16, (2090, 1, 129), 2300), (33, (50, 400, 7), 457)],
)
def test_a_large_ring_matches_the_oracle(layout, ring_size, lengths, context_length):
    check(plan_ring(lengths, context_length, ring_size, layout), 2, 1, 32, seed=ring_size)


SHORT = [1 + 7 * index % 11 for index in range(300)]


RINGS = [
    (12, SHORT, 0, (2, 2, 32)),  # hundreds of short documents
    (21, [700], 0, (7, 1, 64)),  # one across all ranks
    (48, [127, 128, 129, 1, 60], 15, (4, 1, 32)),
    (63, [13, 1, 9], 0, (8, 2, 32)),  # more ranks than tokens
    (64, [377, 1, 64, 128], 31, (8, 1, 32)),
    (64, [200, 28], 0, (1, 1, 128)),
]
# One document is cut as in zigzag: where there are many, it differs.
SAMPLE = [(*ring, "document_zigzag") for ring in (RINGS[0], RINGS[3], RINGS[5])]


@pytest.mark.parametrize(
    ("ring_size", "lengths", "padding", "shape", "layout"),
    [(*ring, layout) for ring in RINGS for layout in LAYOUTS if layout != "document_zigzag"]
    + SAMPLE,
)
def test_rings_up_to_64_match_the_oracle(ring_size, lengths, padding, shape, layout):
    plan = plan_ring(lengths, sum(lengths) + padding, ring_size, layout)
    check(plan, *shape, seed=ring_size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 200), max_size=6),
    padding=st.integers(0, 100),
    ring_size=st.integers(1, 12),
    heads_size=st.integers(1, 3),
    layout=st.sampled_from((*LAYOUTS, "auto")),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from((1, 4, 7, 8)),
    width=st.sampled_from((32, 64, 128)),
)
def test_any_ring_matches_the_oracle(
    lengths, padding, ring_size, heads_size, layout, kv_heads, group, width
):
    length = max(1, sum(lengths) + padding)
    plan = plan_ring(lengths, length, ring_size, layout, heads_size=heads_size)
    check(plan, kv_heads * group, kv_heads, width)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changed", [0, 2, 4])
def test_a_document_changes_no_bit_of_another(layout, changed):
    rng = random.Random(changed)
    lengths = [rng.randint(1, 300), 129, 1, 127, 200]
    context_length = sum(lengths) + 10
    plan = plan_ring(lengths, context_length, 4, layout)
    tensors = inputs(context_length, 4, 2, 32, torch.float32)
    before = simulate(plan, *tensors, CPU)
    start = sum(lengths[:changed])
    part = slice(start, start + lengths[changed])
    for tensor in tensors:
        # Values that would show anywhere, were they only multiplied by zero.
        tensor[:, part] = torch.nan
    after = simulate(plan, *tensors, CPU)
    for one, other in zip(before, after, strict=True):
        assert other[:, part].isnan().all()
        assert torch.equal(one[:, :start], other[:, :start])
        assert torch.equal(one[:, part.stop :], other[:, part.stop :])
