import pytest
import torch

from ringworld_model.ring import plan_ring
from ringworld_model.ring.backend import ring_kernel
from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.rectangle import Rectangle
from ringworld_model.ring.reference import ReferenceKernel, dense_attention
from ringworld_model.ring.simulation import simulate


def block(queries, keys, heads, kv_heads, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries * keys + heads)

    def normal(tokens, heads):
        # Heads and tokens strided, as the ring's slices are.
        whole = torch.randn(2, tokens + 3, heads, width, generator=generator, dtype=torch.float64)
        return whole.to(dtype).transpose(1, 2)[:, :, 2 : tokens + 2]

    return normal(queries, heads), normal(keys, kv_heads), normal(keys, kv_heads)


@pytest.mark.parametrize("kernel", [CpuKernel(), ReferenceKernel()], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "width", "diagonal"),
    [
        (1, 1, 2, 2, 32, True),
        (129, 129, 4, 1, 64, True),
        (200, 77, 7, 1, 128, False),
        (3, 300, 8, 2, 32, False),
    ],
)
def test_kernels_match_autograd(kernel, queries, keys, heads, kv_heads, width, diagonal):
    q, k, v = block(queries, keys, heads, kv_heads, width)
    scale = 0.3
    out, lse = kernel.forward(q, k, v, diagonal, scale)
    grad_out = torch.randn(out.shape, dtype=torch.float64).transpose(1, 2).contiguous()
    got = kernel.backward(grad_out.transpose(1, 2), q, k, v, out, lse, diagonal, scale)

    q2, k2, v2 = (tensor.detach().clone().requires_grad_() for tensor in (q, k, v))
    repeats = heads // kv_heads
    scores = q2 @ k2.repeat_interleave(repeats, 1).transpose(-1, -2) * scale
    if diagonal:
        scores = scores.masked_fill(torch.ones(queries, keys).triu(1).bool(), -torch.inf)
    expected = torch.softmax(scores, -1) @ v2.repeat_interleave(repeats, 1)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=0, atol=1e-13)
    wanted = torch.autograd.grad(expected, (q2, k2, v2), grad_out.transpose(1, 2))
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_the_oracle_masks_by_segment():
    q, k, v = (tensor.transpose(1, 2) for tensor in block(6, 6, 2, 1, 8))
    segment_ids = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    out = dense_attention(q, k, v, segment_ids)
    assert torch.allclose(out[0, 2], v[0, 2].expand(2, -1))
    assert torch.allclose(out[1, 1], v[1, 1].expand(2, -1))
    assert not out[segment_ids == 0].any()
    alone = dense_attention(q[:1, 2:5], k[:1, 2:5], v[:1, 2:5], torch.ones(1, 3, dtype=torch.int))
    assert torch.allclose(out[:1, 2:5], alone, rtol=0, atol=1e-15)


def test_the_cpu_kernel_refuses_what_its_op_gets_wrong():
    kernel = CpuKernel()
    q, k, v = block(4, 6, 2, 2, 8)
    with pytest.raises(ValueError, match="needs queries and keys, got 0 and 6"):
        kernel.forward(q[:, :, :0], k, v, False, 1.0)
    with pytest.raises(ValueError, match="needs queries and keys, got 4 and 0"):
        kernel.forward(q, k[:, :, :0], v[:, :, :0], False, 1.0)
    with pytest.raises(ValueError, match="square, got 4 queries and 6 keys"):
        kernel.forward(q, k, v, True, 1.0)
    strided = torch.randn(2, 2, 8, 4, dtype=torch.float64).transpose(2, 3)
    with pytest.raises(ValueError, match="contiguous last dim"):
        kernel.forward(strided, k, v, False, 1.0)
    out, lse = kernel.forward(q, k, v, False, 1.0)
    with pytest.raises(ValueError, match="out and grad_out need a contiguous last dim"):
        kernel.backward(strided, q, k, v, out, lse, False, 1.0)
    with pytest.raises(ValueError, match="both must be torch.float64"):
        kernel.backward(out.float(), q, k, v, out, lse, False, 1.0)


def whole_bf16(length, seed):
    """grad_out, q, k, v in bf16; fp64 gradients of causal attention; those of one bf16 call."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(1, heads, length, 32, generator=generator) for heads in (2, 2, 1, 1)]
    inputs = [tensor.bfloat16() for tensor in drawn]
    results = []
    for grad_out, q, k, v in ([tensor.double() for tensor in inputs], inputs):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        results.append(backward(grad_out, q, k, v, out, lse, 0.0, True))
    return inputs, results[0], results[1]


@pytest.mark.parametrize(
    ("length", "ring_size", "layout"),
    [
        (1024, 1, "zigzag"),
        (2600, 1, "zigzag"),
        (2048, 2, "zigzag"),
        (4096, 2, "zigzag"),
        (4095, 2, "document_zigzag"),
        (4700, 2, "block_cyclic"),
        (4096, 4, "contiguous"),
    ],
)
def test_large_bf16_gradients_are_closer_than_one_full_call(length, ring_size, layout):
    inputs, wanted, one_call = whole_bf16(length, seed=0)
    plan = plan_ring([length], length, ring_size, layout)
    grad_out, q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
    found = simulate(plan, q, k, v, grad_out, ring_kernel("cpu"))[1:]
    sums = [tensor.transpose(1, 2) for tensor in found]
    for got, full, truth in zip(sums, one_call, wanted, strict=True):
        error = (got.bfloat16().double() - truth).norm()
        assert error <= (full.double() - truth).norm()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_kernel_cuts_diagonals_into_the_same_pairs(dtype, backward):
    whole = Rectangle(100, 2701, 7, 2608, True)
    covered = torch.zeros(2601, 2601, dtype=torch.int8)
    begun = set()
    for (q0, q1, k0, k1, diagonal), wide in CpuKernel().pieces(dtype, whole, backward):
        part = torch.ones(q1 - q0, k1 - k0, dtype=torch.int8)
        covered[q0 - 100 : q1 - 100, k0 - 7 : k1 - 7] += part.tril() if diagonal else part
        # Sums begin with the piece of a query's first keys.
        assert (k0 == 7) == begun.isdisjoint(range(q0, q1))
        begun.update(range(q0, q1))
        large = not diagonal and q1 - q0 >= 1024
        assert wide == (dtype == torch.bfloat16 and not (backward and large))
    assert torch.equal(covered, torch.ones_like(covered).tril())
