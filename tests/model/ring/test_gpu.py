"""Every backend on a CUDA device, against the fp64 oracle; whole calls of ``ring_attention``."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringworld_model.ring import choose_backend, plan_ring, ring_attention
from ringworld_model.ring.backend import explain_kernel, ring_kernel
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.reference import dense_attention
from ringworld_model.ring.simulation import simulate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CUDA = torch.device("cuda")
HALF = [("triton", torch.bfloat16), ("flash", torch.bfloat16), ("flash", torch.float16)]
PACKED = (1, 300, 128, 127, 440)


def inputs(length, heads, kv_heads, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, length, count, width, generator=generator).to(CUDA, dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def oracle(lengths, q, k, v, grad_out):
    ids = torch.zeros(q.shape[:2], dtype=torch.int32)
    real = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
    ids[0, : len(real)] = real.int()
    q, k, v = (tensor.double().requires_grad_() for tensor in (q, k, v))
    out = dense_attention(q, k, v, ids.to(CUDA))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.double())]


def norm_error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def one_call_a_document(lengths, tensors):
    """torch's own FA2, which a backend may not be worse than."""
    wholes = [torch.zeros_like(tensors[which]) for which in (0, 0, 1, 2)]
    start = 0
    for length in lengths:
        some = slice(start, start + length)
        part = [tensor[:, some].transpose(1, 2) for tensor in tensors]
        q, k, v = (tensor.detach().requires_grad_() for tensor in part[:3])
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        for whole, found in zip(
            wholes, (out, *torch.autograd.grad(out, (q, k, v), part[3])), strict=True
        ):
            whole[:, some] = found.detach().transpose(1, 2)
        start += length
    return wholes


@pytest.mark.parametrize(("backend", "dtype"), HALF)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (8, 2, 128), (7, 1, 32)])
def test_half_precision_is_close_to_one_call(backend, dtype, layout, heads, kv_heads, width):
    tensors = inputs(1024, heads, kv_heads, width, dtype)
    wanted, one_call = oracle(PACKED, *tensors), one_call_a_document(PACKED, tensors)
    # Flash ops round what each call gives; ours rounds once.
    room = 1.0 if backend == "triton" else 1.5
    for ring_size in (1, 2, 3):
        plan = plan_ring(PACKED, 1024, ring_size, layout)
        got = simulate(plan, *tensors, ring_kernel(backend))
        for name, one, full, truth in zip(
            ("out", "dq", "dk", "dv"), got, one_call, wanted, strict=True
        ):
            error, limit = norm_error(one.to(dtype), truth), norm_error(full, truth)
            assert error <= room * limit, f"ring {ring_size}, {name}: {error:.2e}, {limit:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_triton_matches_the_oracle(layout):
    tensors = inputs(1024, 4, 2, 64, torch.float32)
    got = simulate(plan_ring(PACKED, 1024, 3, layout), *tensors, ring_kernel("triton"))
    for name, one, other in zip(
        ("out", "dq", "dk", "dv"), got, oracle(PACKED, *tensors), strict=True
    ):
        error = ((one - other).abs().max() / other.abs().max()).item()
        assert error <= 5e-6, f"{name}: {error:.2e}"


@pytest.fixture
def deterministic():
    """Flash ops sum dq in any order otherwise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_of_nan_changes_no_bit_of_another(deterministic, backend, layout):
    plan = plan_ring(PACKED, 1024, 3, layout)
    tensors = inputs(1024, 4, 2, 64, torch.bfloat16)
    before = simulate(plan, *tensors, ring_kernel(backend))
    part = slice(301, 429)
    for tensor in tensors:
        tensor[:, part] = torch.nan
    after = simulate(plan, *tensors, ring_kernel(backend))
    for one, other in zip(before, after, strict=True):
        assert other[:, part].isnan().all()
        for kept in (slice(0, 301), slice(429, None)):
            assert torch.equal(one[:, kept], other[:, kept])


@pytest.mark.parametrize("backend", ["auto", "flash", "triton"])
def test_a_whole_call_in_an_nccl_group_of_one(backend, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        tensors = inputs(1024, 4, 2, 64, torch.bfloat16)
        q, k, v = (tensor.requires_grad_() for tensor in tensors[:3])
        out = ring_attention(
            q, k, v, plan=plan_ring(PACKED, 1024, 1), group=dist.group.WORLD, backend=backend
        )
        got = [out, *torch.autograd.grad(out, (q, k, v), tensors[3])]
        for one, other in zip(got, oracle(PACKED, *tensors), strict=True):
            assert one.dtype == torch.bfloat16
            assert norm_error(one, other) < 1e-2
    finally:
        dist.destroy_process_group()


def test_the_choice_is_explained():
    backend, reason = choose_backend("cuda", "bfloat16", "auto", 128)
    assert backend == "triton" and "Triton" in reason
    # Whatever is installed, one op is right on this device.
    assert "flash" in explain_kernel("flash", CUDA, torch.bfloat16, 128)
