"""Rings larger than the machine, and one document's influence on another, in one process."""

import random

import pytest
import torch

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
    real = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
    ids[0, : len(real)] = real.to(torch.int32)
    return ids


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("ring_size", "lengths", "context_length"),
    [(7, (1, 900, 128, 127), 1200), (16, (2090, 1, 129), 2300), (33, (50, 400, 7), 457)],
)
def test_a_large_ring_matches_the_oracle(layout, ring_size, lengths, context_length):
    q, k, v, grad_out = inputs(context_length, 2, 1, 32, torch.float64, seed=ring_size)
    plan = plan_ring(lengths, context_length, ring_size, layout)
    got = simulate(plan, q, k, v, grad_out, CPU)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = dense_attention(q, k, v, segments(lengths, context_length))
    wanted = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        error = ((one - other).abs().max() / other.abs().max()).item()
        assert error <= 1e-12, f"{name}: {error:.2e}"


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
