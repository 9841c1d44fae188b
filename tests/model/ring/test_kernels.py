import pytest
import torch

from ringworld_model.ring.backend import block_kernel, choose_backend
from ringworld_model.ring.reference import dense_attention


def block(queries, keys, heads, kv_heads, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries * keys + heads)

    def normal(tokens, heads):
        # Heads and tokens strided, as the ring's slices are.
        whole = torch.randn(2, tokens + 3, heads, width, generator=generator, dtype=torch.float64)
        return whole.to(dtype).transpose(1, 2)[:, :, 2 : tokens + 2]

    return normal(queries, heads), normal(keys, kv_heads), normal(keys, kv_heads)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "width", "diagonal"),
    [
        (1, 1, 2, 2, 32, True),
        (129, 129, 4, 1, 64, True),
        (200, 77, 7, 1, 128, False),
        (3, 300, 8, 2, 32, False),
    ],
)
def test_kernels_match_autograd(name, queries, keys, heads, kv_heads, width, diagonal):
    q, k, v = block(queries, keys, heads, kv_heads, width)
    kernel, scale = block_kernel(name), 0.3
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
    kernel = block_kernel("cpu")
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


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "torch.float32"])
def test_auto_takes_the_cpu_kernel_on_cpu(dtype):
    backend, reason = choose_backend("cpu", dtype)
    assert backend == "cpu"
    assert "cpu" in reason and dtype.removeprefix("torch.") in reason


def test_reference_runs_anywhere_when_asked_for():
    assert choose_backend("cuda", "bfloat16", "reference")[0] == "reference"


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "message"),
    [
        ("cuda", "bfloat16", "auto", "no kernel for device 'cuda'.*accelerator: cpu"),
        ("cuda", "bfloat16", "cpu", "no kernel for device 'cuda'"),
        ("cuda", "bfloat16", "flash", "'flash' is not in this version"),
        ("cpu", "float32", "triton", "'triton' is not in this version"),
        ("cpu", "float32", "fast", "'fast' is unknown; choose one of auto, cpu"),
        ("cpu", "int64", "auto", "takes float64.*not int64"),
    ],
)
def test_impossible_backends_are_refused_with_a_remedy(device, dtype, requested, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(device, dtype, requested)


@pytest.mark.parametrize(
    ("queries", "keys", "diagonal"), [(1024, 1024, True), (2100, 2100, True), (1100, 1700, False)]
)
def test_large_bf16_gradients_are_closer_than_the_op_itself(queries, keys, diagonal):
    q, k, v = block(queries, keys, 2, 1, 32, torch.bfloat16)
    grad_out = torch.randn(2, queries, 2, 32).bfloat16().transpose(1, 2)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    exact = [tensor.double() for tensor in (grad_out, q, k, v)]
    out, lse = forward(*exact[1:], 0.0, diagonal)
    wanted = backward(*exact, out, lse, 0.0, diagonal)
    out, lse = forward(q, k, v, 0.0, diagonal)
    alone = backward(grad_out, q, k, v, out, lse, 0.0, diagonal)
    kernel = block_kernel("cpu")
    out, lse = kernel.forward(q, k, v, diagonal, 32**-0.5)
    # The lse of a longer row is a strided slice.
    lse = torch.cat((lse, lse), -1)[..., :queries]
    got = kernel.backward(grad_out, q, k, v, out.to(q.dtype), lse, diagonal, 32**-0.5)
    for one, other, truth in zip(got, alone, wanted, strict=True):
        assert one.dtype == torch.float32
        error = (one.to(q.dtype).double() - truth).norm()
        assert error <= (other.double() - truth).norm()
