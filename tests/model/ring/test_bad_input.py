"""Bad input is one clear error on every rank of the ring, before anything is sent, and no hang."""

import pytest
import torch
import torch.distributed as dist

from ringworld_model.ring import RingContext, RingStats, plan_ring, ring_attention
from ringworld_model.ring.backend import choose_backend
from ringworld_model.ring.reference import dense_attention


def good():
    return {
        "q": torch.zeros(1, 64, 4, 8),
        "k": torch.zeros(1, 64, 2, 8),
        "v": torch.zeros(1, 64, 2, 8),
        "plan": plan_ring([90], 128, 2, "zigzag"),
    }


# What each of two ranks changes in the good arguments, and what both must say.
WRONG = {
    "both: heads": (2 * [{"q": torch.zeros(1, 64, 3, 8)}], "multiple of Hkv"),
    "both: group size": (2 * [{"plan": plan_ring([90], 192, 3)}], "the group has 2 ranks"),
    "both: empty": (
        2 * [{name: torch.zeros(0, 64, 2, 8) for name in "qkv"}],
        "is empty; every rank brings at least one row",
    ),
    "both: head_dim": (
        2 * [{name: torch.zeros(1, 64, 1, 2000) for name in "qkv"}],
        "head_dim of 1 to 1024, not 2000",
    ),
    "both: backend": (2 * [{"backend": "triton"}], "triton needs a CUDA device"),
    "both: device": (2 * [{"v": torch.zeros(1, 64, 2, 8, device="meta")}], "cpu, cpu, meta"),
    "both: scale": (2 * [{"softmax_scale": float("nan")}], "softmax_scale=nan must be a finite"),
    "both: scale's kind": (2 * [{"softmax_scale": "1"}], "softmax_scale='1' must be a finite int"),
    "one: no plan": ([{"plan": None}, {}], "ring rank 0: plan is 'None'; give what plan_ring"),
    "one: a list of plans": ([{}, {"plan": [[90]]}], "ring rank 1: plan is .*give what plan_ring"),
    "one: no tensor": ([{"q": [[1.0]]}, {}], "q, k, v are of type list, Tensor, Tensor"),
    "one: a number": ([{}, {"q": torch.tensor(1.0)}], r"ring rank 1: q must be \[B, T, H, D\]"),
    "one: sparse": ([{}, {"q": good()["q"].to_sparse()}], "make them dense with to_dense"),
    "one: rows": ([{"plan": []}, {}], r"refused on 1 of 2 ranks: ring rank 0: 0 plans for 1 rows"),
    "one: length": ([{}, {"plan": plan_ring([90], 256, 2)}], "ring rank 1: q holds 64 tokens"),
    "one: group size": ([{}, {"plan": plan_ring([9], 64, 1)}], r"ring rank 1: plan.ring_size=1"),
    "one: dtype": (
        [{}, {name: torch.zeros(1, 64, 2, 8).double() for name in "qkv"}],
        r"different inputs.*rank 0.*float32.*rank 1.*float64",
    ),
    "one: documents": (
        [{}, {"plan": plan_ring([89], 128, 2, "zigzag")}],
        "different inputs; give all the same rows, plans",
    ),
    "one: backward": (
        [{}, {"q": torch.zeros(1, 64, 4, 8, requires_grad=True)}],
        "without gradients.*with gradients",
    ),
    "one: backward of v": (
        [{"v": torch.zeros(1, 64, 2, 8, requires_grad=True)}, {}],
        "with gradients.*without gradients",
    ),
}


def every_mistake(rank, world_size):
    said = {}
    for name, (changes, _) in WRONG.items():
        stats = RingStats()
        try:
            ring_attention(**(good() | changes[rank]), group=dist.group.WORLD, stats=stats)
        except ValueError as error:
            said[name] = str(error), stats.bytes_sent
    # The group is whole after all of it.
    out = ring_attention(**good(), group=dist.group.WORLD)
    lonely = dist.new_group([0])
    if rank == 1:
        try:
            ring_attention(**good(), group=lonely)
        except ValueError as error:
            said["stranger"] = str(error), 0
    return said, tuple(out.shape), astray_in_a_later_layer(rank)


def astray_in_a_later_layer(rank):
    """What a rank hears where rank 1's second layer differs, and the shape of the third's out."""
    q, k, v, plan = good().values()
    context = RingContext([plan], dist.group.WORLD)
    context.attend(q, k, v)
    try:
        context.attend(q[:, :3] if rank == 1 else q, k, v)
    except ValueError as error:
        return str(error), context.attend(q, k, v).shape
    return "", None


@pytest.fixture(scope="module")
def ranks(run_gang):
    return run_gang(every_mistake, 2, timeout=90.0)


@pytest.mark.parametrize("name", WRONG)
def test_every_rank_says_the_same_and_sends_nothing(ranks, name):
    (first, sent), second = (ranks[rank][0][name] for rank in (0, 1))
    assert (first, sent) == second
    assert sent == 0
    with pytest.raises(ValueError, match=WRONG[name][1]):
        raise ValueError(first)


def test_the_ring_works_after_refusals_and_refuses_strangers(ranks):
    assert ranks[0][1] == ranks[1][1] == (1, 64, 4, 8)
    assert "not in the group" in ranks[1][0]["stranger"][0]


def test_a_context_asks_in_every_layer(ranks):
    for rank in (0, 1):
        problem, shape = ranks[rank][2]
        assert "refused on 1 of 2 ranks: ring rank 1" in problem
        assert "need equal B, T and D" in problem
        assert shape == (1, 64, 4, 8)


@pytest.mark.parametrize("requested", ["auto", "reference"])
def test_a_head_no_kernel_takes_is_refused(requested):
    choose_backend("cpu", "float32", requested, 1024)
    with pytest.raises(ValueError, match="head_dim of 1 to 1024, not 1025; use more heads"):
        choose_backend("cpu", "float32", requested, 1025)


@pytest.mark.parametrize(
    "view",
    [
        lambda tensor: tensor.movedim(1, -1).contiguous().movedim(-1, 1),
        lambda tensor: torch.cat((tensor, tensor), -1)[..., ::2].contiguous()[..., :],
        lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
        lambda tensor: tensor[:, :, :1].expand(tensor.shape),
        lambda tensor: tensor[..., :1].expand(tensor.shape),
        lambda tensor: tensor[:, :1].expand(tensor.shape),
    ],
)
def test_strided_and_broadcast_tensors_are_never_read_wrong(view):
    torch.manual_seed(3)
    q, k, v, grad = (view(torch.randn(1, 40, 4, 16, dtype=torch.float64)) for _ in range(4))
    tensors = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = ring_attention(*tensors, plan=plan_ring([30, 10], 40, 1))
    expected = dense_attention(*tensors, torch.tensor([[1] * 30 + [2] * 10]))
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    wanted = torch.autograd.grad(expected, tensors, grad)
    for one, other in zip(torch.autograd.grad(out, tensors, grad), wanted, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


PLAN = plan_ring([70, 30], 100, 1)


def drawn(dtype=torch.float32):
    torch.manual_seed(5)
    return [torch.randn(1, 100, heads, 16).to(dtype) for heads in (4, 2, 2, 4)]


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "qv"])
def test_gradients_go_only_where_they_are_wanted(wanted):
    *tensors, grad_out = drawn()
    for tensor in tensors:
        tensor.requires_grad_()
    every = torch.autograd.grad(ring_attention(*tensors, plan=PLAN), tensors, grad_out)
    some = [tensor.detach() for tensor in tensors]
    for name, tensor in zip("qkv", some, strict=True):
        tensor.requires_grad_(name in wanted)
    ring_attention(*some, plan=PLAN).backward(grad_out)
    for tensor, gradient in zip(some, every, strict=True):
        assert (
            tensor.grad is None if not tensor.requires_grad else torch.equal(tensor.grad, gradient)
        )


def test_without_gradients_nothing_is_kept():
    q, k, v, _ = drawn()
    with torch.no_grad():
        out = ring_attention(q.requires_grad_(), k, v, plan=PLAN)
    assert not out.requires_grad
    assert torch.equal(out, ring_attention(q, k, v, plan=PLAN))


def test_a_second_derivative_is_refused():
    *tensors, grad_out = drawn()
    q = tensors[0].requires_grad_()
    out = ring_attention(*tensors, plan=PLAN)
    (dq,) = torch.autograd.grad(out, q, grad_out.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_no_bit(dtype, backend):
    *tensors, grad_out = drawn(dtype)
    for tensor in tensors:
        tensor.requires_grad_()

    def run():
        out = ring_attention(*tensors, plan=PLAN, backend=backend)
        return out, *torch.autograd.grad(out, tensors, grad_out)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    for one, other in zip(plain, cast, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_the_scale_is_a_factor_of_the_scores():
    q, k, v, _ = drawn(torch.float64)
    out = ring_attention(q, k, v, plan=PLAN, softmax_scale=0.3)
    assert torch.allclose(out, ring_attention(q * 0.3 * 4, k, v, plan=PLAN), rtol=0, atol=1e-13)
