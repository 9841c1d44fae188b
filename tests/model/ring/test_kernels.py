import pytest
import torch

from ringworld_model.ring import plan_ring
from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.reference import ReferenceKernel, dense_attention


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
        (4700, 2, "block_cyclic"),
        (4096, 4, "contiguous"),
    ],
)
def test_large_bf16_gradients_are_closer_than_one_full_call(length, ring_size, layout):
    (grad_out, q, k, v), wanted, one_call = whole_bf16(length, seed=0)
    kernel, scale = CpuKernel(), 32**-0.5
    out, lse = kernel.forward(q, k, v, True, scale)
    out = out.to(q.dtype)
    plan = plan_ring([length], length, ring_size, layout)
    sums = [torch.zeros(tensor.shape) for tensor in (q, k, v)]
    for rank in range(ring_size):
        for step in range(ring_size):
            of_q = plan.local_indices(rank)
            of_k = plan.local_indices((rank - step) % ring_size)
            for q0, q1, k0, k1, diagonal in plan.rectangles(rank, step):
                rows, cols = (..., of_q[q0:q1], slice(None)), (..., of_k[k0:k1], slice(None))
                # A strided slice of lse, as the ring passes it.
                some = torch.stack((lse, lse), -1)[..., of_q[q0:q1], 0]
                parts = grad_out[rows], q[rows], k[cols], v[cols], out[rows], some
                shares = kernel.backward(*parts, diagonal, scale)
                for total, where, share in zip(sums, (rows, cols, cols), shares, strict=True):
                    total[where] += share
    for got, full, truth in zip(sums, one_call, wanted, strict=True):
        error = (got.to(q.dtype).double() - truth).norm()
        assert error <= (full.double() - truth).norm()
