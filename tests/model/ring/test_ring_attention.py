"""Ring attention on real processes against the fp64 oracle: out, dq, dk and dv each on its own.

One gloo world of 8 serves every ring size, as subgroups, because starting a process costs seconds.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist

from ringworld_model.ring import RingContext, plan_ring, plan_rows, ring_attention
from ringworld_model.ring.comm import Exchange, Message, Parcel, Ring, RingStats
from ringworld_model.ring.reference import dense_attention

TENSORS = ("out", "dq", "dk", "dv")
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6}


@dataclass(frozen=True)
class Case:
    name: str
    ring_size: int
    context_length: int
    documents: tuple[tuple[int, ...], ...]
    heads: tuple[int, int]
    width: int
    layout: str = "auto"
    backend: str = "auto"
    heads_size: int = 1

    @property
    def num_ranks(self):
        return self.ring_size * self.heads_size

    def plans(self):
        return plan_rows(
            self.documents,
            self.context_length,
            self.ring_size,
            self.layout,
            heads_size=self.heads_size,
        )


EDGES = (1, 127, 128, 129)
MANY = (3, 40, 1, 17, 90, 5, 64, 2, 33, 71, 8, 120, 1, 1, 60, 11)
CASES = [
    Case("alone", 1, 700, ((700,),), (4, 4), 64),
    Case("alone packed", 1, 600, ((300, 1, 128), EDGES), (8, 1), 32, "block_cyclic"),
    Case("dense", 2, 1024, ((1024,),), (4, 4), 64),
    Case("dense striped", 2, 513, ((513,),), (8, 8), 32, "striped"),
    Case("two rows, two plans", 2, 777, ((700, 33), MANY), (7, 1), 32, "block_cyclic"),
    Case("wide heads", 2, 300, ((131, 169),), (4, 1), 128, "contiguous"),
    Case("reference blocks", 2, 200, ((150, 30),), (4, 2), 32, "block_cyclic", "reference"),
    Case("dense odd", 3, 1001, ((1001,),), (4, 1), 64, "zigzag"),
    Case("edges", 3, 900, (EDGES + (400,),), (8, 1), 32, "block_cyclic"),
    Case("edges striped", 3, 431, (EDGES,), (2, 2), 64, "striped"),
    Case("long staircase", 2, 4700, ((4700,),), (1, 1), 32, "block_cyclic"),
    Case("packed", 4, 1100, (MANY + (500,),), (7, 1), 64, "block_cyclic"),
    Case("packed zigzag", 4, 1100, (MANY + (500,),), (8, 1), 32, "zigzag"),
    Case("same plan twice", 4, 640, ((600,), (600,), (1, 639)), (4, 4), 32),
    Case("five", 5, 1283, ((129, 800, 1, 127),), (8, 2), 32),
    Case("shorter than the ring", 5, 3, ((2, 1),), (2, 1), 32, "striped"),
    Case("nothing but padding", 5, 64, ((),), (2, 2), 32),
    Case("eight", 8, 1500, ((1, 1250, 127),), (8, 1), 64, "block_cyclic"),
    Case("eight auto", 8, 1031, (MANY + (129,),), (4, 4), 32),
    Case("2x2 dense", 2, 1024, ((1024,),), (4, 4), 64, heads_size=2),
    Case("2x2 two plans", 2, 777, ((700, 33), MANY), (8, 2), 32, "block_cyclic", heads_size=2),
    Case("2x2 one key head", 2, 600, ((300, 1, 128),), (6, 1), 64, "zigzag", heads_size=2),
    Case("3x2 odd", 3, 1001, ((1001,),), (4, 4), 64, "zigzag", heads_size=2),
    Case("3x2 edges", 3, 901, (EDGES + (400,),), (6, 2), 32, "striped", heads_size=2),
    Case("2x4 shared key heads", 2, 1100, (MANY + (500,),), (8, 2), 64, heads_size=4),
    Case("2x4 shorter than the ranks", 2, 3, ((2, 1),), (4, 1), 32, "striped", heads_size=4),
    Case("1x4 dense", 1, 515, ((515,),), (8, 4), 64, heads_size=4),
    Case("1x4 packed", 1, 640, ((600,), (600,), (1, 639)), (4, 1), 32, heads_size=4),
    Case("several chunks of heads", 2, 512, ((300, 200),), (6, 3), 1024),
    Case("chunks reuse memory", 4, 1100, (MANY + (500,),), (3, 3), 1024, "block_cyclic"),
    Case("alone cut", 1, 70, ((30, 1, 33),), (2, 1), 32, "document_zigzag"),
    Case("two cuts", 2, 777, ((700, 33), MANY), (4, 1), 32, "document_zigzag"),
    Case("three cuts", 3, 431, (EDGES,), (2, 2), 64, "document_zigzag"),
    Case("four cuts", 4, 640, (MANY, (1, 639)), (7, 1), 32, "document_zigzag"),
    Case("five cuts", 5, 331, ((129, 1, 127, 9),), (2, 2), 32, "document_zigzag"),
    Case("eight cuts", 8, 563, (MANY + (20,),), (4, 1), 32, "document_zigzag"),
    Case("2x2 cuts", 2, 301, ((128, 1, 129), (300,)), (4, 2), 32, "document_zigzag", heads_size=2),
    # Rows in more pieces than are copied one by one.
    Case("many cuts", 4, 530, 2 * ((13,) * 40,), (4, 2), 32, "document_zigzag"),
    Case("many stripes", 4, 545, 2 * ((9,) * 60,), (2, 1), 32, "striped"),
    Case("cut to nothing", 8, 7, ((4, 3),), (8, 2), 64, "document_zigzag"),
]
NAMED = {case.name: case for case in CASES}


def whole_inputs(case, dtype):
    """q, k, v and the gradient of out, the same on every rank: drawn in fp64, then rounded."""
    generator = torch.Generator().manual_seed(CASES.index(case) + 1)
    rows, length = len(case.documents), case.context_length
    heads, kv_heads = case.heads

    def normal(heads):
        shape = (rows, length, heads, case.width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)


def run_rank(case, dtype, rank, group, heads_group, stats):
    plans = case.plans()
    length = plans[0].local_length
    # Padding is filled with NaN: none of it may reach anything.
    tensors = []
    for whole in whole_inputs(case, dtype):
        local = whole.new_full((whole.shape[0], length, *whole.shape[2:]), torch.nan)
        for row, (lengths, plan) in enumerate(zip(case.documents, plans, strict=True)):
            indices = plan.local_indices(rank)
            real = indices < sum(lengths)
            local[row, real] = whole[row, indices[real]]
        tensors.append(local)
    q, k, v, grad_out = tensors
    for tensor in (q, k, v):
        tensor.requires_grad_()
    context = RingContext(plans, group, case.backend, stats, heads_group)
    out = context.attend(q, k, v)
    assert out.dtype == dtype
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]


def check_misuse(group):
    ring = Ring.over(group, 2)
    exchange = Exchange(ring, RingStats())
    here, there = torch.full((2,), float(ring.rank)), torch.zeros(2)
    problems = []

    def attempt(call, *arguments):
        try:
            call(*arguments)
        except (RuntimeError, ValueError) as error:
            problems.append(str(error))

    def moment(send, receive):
        return [[Parcel(Message.HOME, tensor, ring.rank + 1)] for tensor in (send, receive)]

    attempt(exchange.finish)
    attempt(exchange.post, *moment(here, here))
    attempt(exchange.post, *moment(torch.zeros(4)[::2], there))
    exchange.post(*moment(here, there))
    attempt(exchange.post, *moment(here, there))
    exchange.finish()
    attempt(exchange.finish)
    attempt(Ring.over, group, 3)
    return problems, there.tolist()


def groups_of(shape, rank):
    """The ring and heads groups of one rank; made by all ranks, in the same order."""
    ring_size, heads_size = shape
    ranks = torch.arange(ring_size * heads_size).view(shape)
    found = [None, None]
    for axis, members in ((0, ranks.T.tolist()), (1, ranks.tolist())):
        for group in members if shape[axis] > 1 else ():
            made = dist.new_group(group)
            if rank in group:
                found[axis] = made
    return found


def refusals(rank, ring_group, heads_group):
    """What a rank of a 2 x 2 grid says where one rank or all are wrong, and what it sent."""
    stats = RingStats()
    said = []

    def attempt(wrong=(), groups=(ring_group, heads_group), heads=(4, 2), plan=None):
        q, k = (torch.zeros(1, 32 if rank in wrong else 16, size, 8) for size in heads)
        plan = plan or plan_ring([60], 64, 2, heads_size=2)
        try:
            ring_attention(q, k, k, plan=plan, group=groups[0], heads_group=groups[1], stats=stats)
        except ValueError as error:
            said.append(str(error))

    attempt(wrong=[3])
    attempt(heads=(4, 4) if rank == 1 else (4, 2))
    attempt(heads=(3, 3))
    attempt(plan=plan_ring([60], 64, 1, heads_size=4))
    attempt(plan=plan_ring([20], 32 if rank < 2 else 64, 2, heads_size=2))
    attempt(groups=(ring_group, None))
    sent = stats.bytes_sent
    # The groups are whole after all of it.
    attempt()
    return said, sent


def every_case(rank, world_size):
    shapes = dict.fromkeys((case.ring_size, case.heads_size) for case in CASES)
    groups = {shape: groups_of(shape, rank) for shape in shapes}
    results = {}
    for case in CASES:
        if rank >= case.num_ranks:
            continue
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            stats = RingStats()
            mine = groups[case.ring_size, case.heads_size]
            results[case.name, dtype] = run_rank(case, dtype, rank, *mine, stats), stats
    misuse = check_misuse(groups[2, 1][0]) if rank < 2 else None
    refused = refusals(rank, *groups[2, 2]) if rank < 4 else None
    return results, misuse, refused


@pytest.fixture(scope="module")
def ranks(run_gang):
    return run_gang(every_case, 8, timeout=200.0)


def restored(ranks, case, dtype):
    """Whole rows of out, dq, dk, dv from all ranks' parts; padding must be zero."""
    plans = case.plans()
    wholes = []
    for which in range(4):
        locals_ = [ranks[rank][0][case.name, dtype][0][which] for rank in range(case.num_ranks)]
        length = case.num_ranks * plans[0].local_length
        shape = (len(case.documents), length, *locals_[0].shape[2:])
        whole = locals_[0].new_full(shape, torch.nan)
        for rank, local in enumerate(locals_):
            for row, plan in enumerate(plans):
                whole[row, plan.local_indices(rank)] = local[row]
        for row, lengths in enumerate(case.documents):
            assert not whole[row, sum(lengths) :].any(), "padding is not zero"
        wholes.append(whole[:, : case.context_length])
    return wholes


def segment_ids(case):
    ids = torch.zeros(len(case.documents), case.context_length, dtype=torch.int32)
    for row, lengths in enumerate(case.documents):
        sizes = torch.tensor(lengths, dtype=torch.int64)
        real = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), sizes)
        ids[row, : len(real)] = real.to(torch.int32)
    return ids


@cache
def oracle(name, dtype):
    """fp64 out, dq, dk, dv of the inputs as the dtype rounds them."""
    case = NAMED[name]
    q, k, v, grad_out = (tensor.double() for tensor in whole_inputs(case, dtype))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = dense_attention(q, k, v, segment_ids(case))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]


def relative_error(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)).item()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_ring_matches_the_oracle(ranks, name, dtype):
    case = NAMED[name]
    expected = oracle(name, dtype)
    for tensor, got, wanted in zip(TENSORS, restored(ranks, case, dtype), expected, strict=True):
        error = relative_error(got, wanted)
        assert error <= LIMITS[dtype], f"{tensor}: {error:.2e}"


def full_sequence_call(case):
    """The same kernel called once a document, in bf16: what the ring may not be worse than."""
    q, k, v, grad_out = (t.transpose(1, 2) for t in whole_inputs(case, torch.bfloat16))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    wholes = [torch.zeros_like(tensor) for tensor in (q, q, k, v)]
    for row, lengths in enumerate(case.documents):
        start = 0
        for length in lengths:
            part = (slice(row, row + 1), slice(None), slice(start, start + length))
            out, lse = forward(q[part], k[part], v[part], 0.0, True)
            wholes[0][part] = out
            gradients = backward(grad_out[part], q[part], k[part], v[part], out, lse, 0.0, True)
            for whole, gradient in zip(wholes[1:], gradients, strict=True):
                whole[part] = gradient
            start += length
    return [whole.transpose(1, 2) for whole in wholes]


@pytest.mark.parametrize("name", [case.name for case in CASES if any(case.documents)])
def test_bf16_is_no_worse_than_one_full_sequence_call(ranks, name):
    case = NAMED[name]
    expected = oracle(name, torch.bfloat16)
    tensors = zip(
        TENSORS,
        restored(ranks, case, torch.bfloat16),
        full_sequence_call(case),
        expected,
        strict=True,
    )
    for tensor, got, full, wanted in tensors:
        error = (got.double() - wanted).norm() / wanted.norm()
        limit = (full.double() - wanted).norm() / wanted.norm()
        assert error <= limit, f"{tensor}: {error:.2e} against {limit:.2e}"


def test_stats_count_what_is_sent(ranks):
    case = NAMED["dense"]
    for rank in range(2):
        stats = ranks[rank][0]["dense", torch.float32][1]
        block = 2 * 512 * case.heads[1] * case.width * 4  # K and V, or dK and dV, of one rank
        # Zigzag: rank 1 sees only the early half of rank 0's keys. K/V travel forward and
        # backward; of each, the gradients come home once.
        halves = 1 + 1 + 2 if rank == 0 else 2 + 2 + 1
        assert stats.bytes_sent == halves * block // 2
        assert stats.compute_seconds > 0 and stats.wait_seconds > 0
        # Two forward; backward two, and one that brings the gradients home.
        assert (stats.hops, stats.hop, stats.awaits) == (2 + 3, 3, None)
    assert ranks[0][0]["alone", torch.float32][1].bytes_sent == 0


def test_stats_count_what_the_split_of_heads_sends(ranks):
    case = NAMED["1x4 packed"]
    stats = ranks[0][0][case.name, torch.bfloat16][1]
    tokens, width = len(case.documents) * case.plans()[0].local_length, case.width
    # To each of three ranks: a head of q, and the only key and value head; a head of the gradient
    # of out; then out and dq back, dk and dv in fp32 because four ranks have a part of them.
    assert stats.bytes_sent == 3 * tokens * width * (3 * 2 + 2 + 2 * 2 + 2 * 4)
    assert stats.wait_seconds > 0


def test_a_problem_of_one_rank_is_an_error_on_every_rank_of_the_grid(ranks):
    said = [ranks[rank][2][0] for rank in range(4)]
    assert all(len(words) == 6 for words in said)
    assert all(ranks[rank][2][1] == 0 for rank in range(4)), "something was sent before the error"
    for rank in range(4):
        one, differs, heads, shape, rows, missing = said[rank]
        assert "rank 1: q holds 32 tokens a row, but the plan's local_length is 16" in one
        assert "different inputs" in differs and "k (1, 16, 4, 8)" in differs
        assert "2 workers cannot split 3 query heads" in heads
        assert "plan.ring_size=1, but the group has 2 ranks" in shape
        assert "local_length is 8" in rows
        assert "plan.heads_size=2 needs a heads_group of 2 ranks" in missing


def test_misuse_of_an_exchange_raises(ranks):
    for rank in range(2):
        problems, received = ranks[rank][1]
        assert problems[:5] == [
            "finish() without post()",
            "HOME: memory is both sent and received into",
            "HOME: the tensor must be contiguous",
            "post() before finish() of the last",
            "finish() without post()",
        ]
        assert "the group has 2 ranks" in problems[5]
        assert received == [1.0 - rank] * 2


def test_a_ring_of_one_sends_to_nobody():
    exchange = Exchange(Ring.over(None, 1), RingStats())
    exchange.post([], [])
    exchange.finish()
    with pytest.raises(RuntimeError, match="nobody to send to"):
        exchange.post([Parcel(Message.GRADIENTS, torch.zeros(1), 1)], [])
    with pytest.raises(ValueError, match="needs a process group of 2 ranks"):
        Ring.over(None, 2)


def test_inputs_of_any_stride_and_a_broadcast_gradient():
    (plan,) = plan_rows([[50, 14]], 64, 1)
    q, k, v = (torch.randn(1, 2, 16, 64, dtype=torch.float64).movedim(-1, 1) for _ in range(3))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    ids = torch.tensor([[1] * 50 + [2] * 14])
    out = ring_attention(q, k, v, plan=plan, softmax_scale=0.7)
    expected = dense_attention(q, k, v, ids, softmax_scale=0.7)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    got = torch.autograd.grad(out.sum(), (q, k, v))
    for one, other in zip(got, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 64, 3, 8)}, "H must be a multiple of Hkv"),
        ({"q": torch.zeros(64, 4, 8)}, r"q must be \[B, T, H, D\]"),
        ({"v": torch.zeros(1, 64, 2, 4)}, r"k, v the same \[B, T, Hkv, D\]"),
        ({"q": torch.zeros(1, 64, 4, 8).double()}, "cast them to one dtype"),
        ({"plan": plan_rows([[8]], 32, 1)}, "64 tokens a row.*local_length is 32"),
        ({"plan": plan_rows([[8], [9]], 64, 1)}, "2 plans for 1 rows"),
        ({"plan": plan_rows([[8]], 128, 2)}, "needs a process group of 2 ranks"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    arguments = {
        "q": torch.zeros(1, 64, 4, 8),
        "k": torch.zeros(1, 64, 2, 8),
        "v": torch.zeros(1, 64, 2, 8),
        "plan": plan_rows([[8]], 64, 1),
    } | change
    with pytest.raises(ValueError, match=message):
        ring_attention(**arguments)
