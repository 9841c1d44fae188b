"""The flash backend: which calls it makes, what they add up to, and which op it takes.

No GPU: the calls are served by block kernels, or checked by shape on fake CUDA tensors.
"""

import random
from dataclasses import replace

import pytest
import torch

from ringworld_model.ring import plan_ring, ring_attention
from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.block_flash import FlashKernel
from ringworld_model.ring.check import agree
from ringworld_model.ring.flash_libraries import check_arguments, torch_flash
from ringworld_model.ring.flash_op import FlashOp, prove
from ringworld_model.ring.flash_ops import choose_op, first_proved
from ringworld_model.ring.kernel import group_rows
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.reference import ReferenceKernel, dense_attention
from ringworld_model.ring.simulation import simulate
from ringworld_model.ring.varlen import Sequences, group_rectangles, varlen_calls
from ringworld_model.ring.varlen_op import BlockwiseOp

CPU = torch.device("cpu")
EXACT = BlockwiseOp(CpuKernel())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(rows, length, heads, kv_heads, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, length, count, width, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def oracle(rows, q, k, v, grad_out):
    ids = torch.zeros(q.shape[:2], dtype=torch.int32)
    for row, lengths in enumerate(rows):
        real = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
        ids[row, : len(real)] = real.to(torch.int32)
    q, k, v = (tensor.double().requires_grad_() for tensor in (q, k, v))
    out = dense_attention(q, k, v, ids)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.double())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 5])
def test_every_layout_and_ring_matches_the_oracle(layout, ring_size):
    # Two rows that share a plan, so share calls; one with another plan; padding at the end.
    rows = [(1, 300, 128, 127), (1, 300, 128, 127), (590,)]
    tensors = inputs(3, 600, 4, 2, 16, torch.float64, seed=ring_size)
    plans = [plan_ring(lengths, 600, ring_size, layout) for lengths in rows]
    got = simulate(plans, *tensors, FlashKernel(EXACT))
    for name, one, other in zip(
        ("out", "dq", "dk", "dv"), got, oracle(rows, *tensors), strict=True
    ):
        error = ((one - other).abs().max() / other.abs().max()).item()
        assert error <= 1e-12, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (8, 2), (3, 3)])
def test_grouped_heads_in_half_precision(heads, kv_heads):
    tensors = inputs(1, 300, heads, kv_heads, 32, torch.bfloat16)
    plan = plan_ring((80, 200), 300, 3, "zigzag")
    got = simulate(plan, *tensors, FlashKernel(EXACT))
    assert [tensor.dtype for tensor in got] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for one, other in zip(got, oracle([(80, 200)], *tensors), strict=True):
        assert ((one - other).norm() / other.norm()).item() < 5e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_of_nan_changes_no_bit_of_another(layout):
    lengths, context_length = (150, 129, 1, 127, 60), 480
    plan = plan_ring(lengths, context_length, 3, layout)
    tensors = inputs(1, context_length, 2, 1, 16, torch.float32)
    before = simulate(plan, *tensors, FlashKernel(EXACT))
    part = slice(150, 279)
    for tensor in tensors:
        tensor[:, part] = torch.nan
    after = simulate(plan, *tensors, FlashKernel(EXACT))
    for one, other in zip(before, after, strict=True):
        assert other[:, part].isnan().all()
        assert torch.equal(one[:, :150], other[:, :150])
        assert torch.equal(one[:, 279:], other[:, 279:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_hold_each_rectangle_once_and_no_row_twice(layout):
    rng = random.Random(layout)
    for ring_size in (1, 2, 5):
        lengths = [rng.choice((1, 5, 127, 300, 900)) for _ in range(8)]
        plan = plan_ring(lengths, sum(lengths) + 3, ring_size, layout)
        for rank in range(ring_size):
            for step in range(ring_size):
                rectangles = plan.rectangles(rank, step)
                groups = group_rectangles(rectangles)
                assert sorted(rectangles) == sorted(one for group in groups for one in group)
                for group in groups:
                    assert len({one.diagonal for one in group}) == 1
                    for side in (slice(0, 2), slice(2, 4)):
                        ranges = [one[side] for one in group]
                        assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "document_zigzag", "striped"])
def test_one_long_document_is_a_call_a_step_that_copies_nothing(layout):
    plan = plan_ring([4096], 4096, 4, layout)
    for rank in range(4):
        for step in range(4):
            calls = varlen_calls(plan, rank, step, 1, CPU)
            assert len(calls) <= 1
            assert all(call.queries.index is call.keys.index is None for call in calls)


def test_packed_rows_share_calls():
    lengths = [300, 17, 500, 1, 200, 6]
    plan = plan_ring(lengths, 1024, 2, "striped")
    (call,) = varlen_calls(plan, 0, 0, 3, CPU)
    assert call.sequences.causal
    assert call.sequences.cu_queries.dtype == torch.int32
    # Token 817 alone is on rank 1.
    assert torch.equal(
        call.sequences.cu_queries.diff(), torch.tensor([150, 9, 250, 100, 3] * 3).int()
    )
    assert varlen_calls(plan, 0, 0, 3, CPU)[0] is call, "made once"


def test_a_staircase_of_many_calls_is_said_aloud():
    staircase = plan_ring([8192], 8192, 2, "block_cyclic")
    with pytest.warns(RuntimeWarning, match="block_cyclic layout .* takes 8 or more flash calls"):
        assert 8 <= len(varlen_calls(staircase, 1, 1, 1, CPU)) < 16


@pytest.mark.parametrize(("layout", "gathers"), [("contiguous", False), ("block_cyclic", True)])
def test_torchs_op_takes_and_gives_what_the_backend_expects(layout, gathers):
    """torch's own shape rules for its CUDA op, on tensors without memory."""
    meta = torch.device("meta")
    plan = plan_ring([10, 700, 300], 1024, 2, layout)
    calls = [call for step in (0, 1) for call in varlen_calls(plan, 1, step, 2, meta)]
    assert gathers == any(call.queries.index is not None for call in calls)
    rows, kernel = group_rows([plan, plan]), FlashKernel(torch_flash())
    q, grad = (torch.empty(2, 512, 8, 64, dtype=torch.bfloat16, device=meta) for _ in "qg")
    k, v = (torch.empty(2, 512, 2, 64, dtype=torch.bfloat16, device=meta) for _ in "kv")
    sums = [torch.zeros(2, 512, 2, 64, device=meta) for _ in "kv"]
    forward = kernel.forward(1, rows, q, 0.1)
    forward.step(0, k, v)
    forward.step(1, k, v)
    out, lse = forward.finish()
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 8, 512), torch.float32)
    backward = kernel.backward(1, rows, grad, q, out, lse, 0.1)
    backward.step(0, k, v, *sums)
    backward.step(1, k, v, *sums)
    assert backward.finish().shape == q.shape


def served_by(block, name="stand-in"):
    op = BlockwiseOp(block)
    return FlashOp(name, op.forward, op.backward)


def test_an_op_is_proved_and_its_lse_layout_found():
    op = served_by(ReferenceKernel())
    assert prove(op, CPU, torch.bfloat16, 64) == op

    def tokens_first(*given):
        out, lse = op.run_forward(*given)
        return out, lse.t().contiguous()

    def backward(grad, q, k, v, out, lse, *rest):
        assert lse.shape == (len(q), 4) and lse.is_contiguous()
        return op.run_backward(grad, q, k, v, out, lse.t(), *rest)

    turned = prove(FlashOp("turned", tokens_first, backward), CPU, torch.float16, 32)
    assert turned.tokens_first
    with pytest.raises(RuntimeError, match=r"turned gives out .* lse \(4, 25\)"):
        replace(turned, run_forward=op.run_forward).forward(*probe())


def probe():
    bounds = torch.tensor([0, 25], dtype=torch.int32)
    q, k = torch.randn(25, 4, 8), torch.randn(25, 2, 8)
    return q, k, k, Sequences(bounds, bounds, 25, 25, True), 0.3


def test_a_wrong_op_is_refused_and_the_next_taken():
    right = served_by(ReferenceKernel(), "right")

    def padded():
        def forward(*given):
            out, lse = right.run_forward(*given)
            return out, lse.new_zeros(3, 4, 19)

        return FlashOp("padded", forward, right.run_backward)

    def own_lse():
        """Its backward takes the lse of its own keys, as if there were no others."""

        def backward(grad, q, k, v, out, lse, sequences, scale):
            out, lse = right.run_forward(q, k, v, sequences, scale)
            return right.run_backward(grad, q, k, v, out, lse, sequences, scale)

        return FlashOp("own_lse", right.run_forward, backward)

    def unmasked():
        def forward(q, k, v, sequences, scale):
            return right.run_forward(q, k, v, sequences._replace(causal=False), scale)

        return FlashOp("unmasked", forward, right.run_backward)

    def absent():
        raise ModuleNotFoundError("No module named 'absent'\nmore")

    def good():
        return right

    makers = (absent, padded, own_lse, unmasked, good)
    op, why = first_proved(makers, CPU, torch.bfloat16, 16)
    assert op.name == "right"
    assert "absent (No module named 'absent')" in why
    assert "padded (lse has the unknown shape (3, 4, 19))" in why
    assert "own_lse (wrong dq of causal" in why
    assert "unmasked (wrong out of causal" in why
    with pytest.raises(ValueError, match="no op for torch.bfloat16.*not absent.*use .*triton"):
        first_proved((absent,), CPU, torch.bfloat16, 16)


def test_other_versions_are_refused():
    def older(q, k, window, causal=False):
        """Stands for a call."""

    check_arguments(older, "q k window")
    with pytest.raises(ValueError, match="does not take scale; needs window"):
        check_arguments(older, "q k causal scale")
    with pytest.raises(ValueError, match="does not take fast"):
        check_arguments(torch.ops.aten._flash_attention_forward, "fast query")


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 264), (torch.bfloat16, 12)]
)
def test_what_no_flash_op_takes_is_refused(dtype, width):
    with pytest.raises(ValueError, match="bfloat16 and float16.*steps of 8.*triton"):
        choose_op(CPU, dtype, width)


def test_without_a_gpu_no_op_is_found_and_the_reasons_are_told():
    with pytest.raises(ValueError, match=r"no op .* on cpu: not flash_attn_4 \(No module"):
        choose_op(CPU, torch.bfloat16, 64)


def test_a_rank_without_an_op_tells_the_others_before_anything_is_sent(monkeypatch):
    told = []

    def overheard(group, heads_group, problem, terms):
        told.append(problem)
        agree(group, heads_group, problem, terms)

    monkeypatch.setattr("ringworld_model.ring.attention.agree", overheard)
    monkeypatch.setattr(
        "ringworld_model.ring.attention.choose_backend", lambda *_: ("flash", "as on a GPU")
    )
    q = torch.zeros(1, 16, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="has no op for") as caught:
        ring_attention(q, q, q, plan=plan_ring([16], 16, 1))
    assert told == [str(caught.value)]
