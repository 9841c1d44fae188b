"""Cases for Triton's interpreter, which a process decides on before it imports Triton.

Run by test_triton.py with TRITON_INTERPRET=1; prints one JSON object, {case: {name: error}}.
"""

import json
import sys

import torch

from ringworld_model.ring import plan_ring
from ringworld_model.ring.block_triton import TritonKernel
from ringworld_model.ring.kernel import group_rows
from ringworld_model.ring.reference import dense_attention
from ringworld_model.ring.simulation import simulate
from ringworld_model.ring.triton_launch import triton_missing

SHORT = (1, 127, 5, 5, 40, 7, 128, 30)
# name: documents of each row, row length, ring size, layout, heads, key heads, head_dim, dtype
CASES = {
    "one document": ([(257,)], 257, 1, "contiguous", 1, 1, 64, "float32"),
    "packed, 127 to 129": ([(127, 128, 129, 1)], 400, 2, "block_cyclic", 2, 2, 32, "float32"),
    "zigzag, short": ([SHORT], 350, 3, "zigzag", 2, 1, 32, "float32"),
    "striped, short": ([SHORT], 343, 2, "striped", 1, 1, 32, "float32"),
    "zigzag of each document": (
        [SHORT[1:5], (70,)],
        180,
        2,
        "document_zigzag",
        2,
        1,
        32,
        "float32",
    ),
    "contiguous, 4 queries a key": ([(150, 101)], 251, 2, "contiguous", 4, 1, 32, "float32"),
    "block-cyclic, 7 queries a key": ([(150, 5)], 160, 3, "block_cyclic", 7, 1, 32, "float32"),
    "head_dim 128": ([(129, 30)], 161, 2, "zigzag", 1, 1, 128, "float32"),
    "head_dim 40": ([(100, 30)], 130, 1, "contiguous", 1, 1, 40, "float32"),
    "two rows": ([(200, 3), (90, 110)], 210, 2, "block_cyclic", 1, 1, 64, "float32"),
    "no document": ([(), (60,)], 70, 2, "zigzag", 1, 1, 32, "float32"),
    "bfloat16": ([(150, 100)], 260, 2, "zigzag", 2, 1, 64, "bfloat16"),
    "bfloat16, one call": ([(150, 100)], 260, 1, "contiguous", 2, 1, 64, "bfloat16"),
    "float16": ([(150, 100)], 260, 2, "zigzag", 2, 1, 64, "float16"),
}
NAMES = ("out", "dq", "dk", "dv")


def inputs(batch, length, heads, kv_heads, width, dtype):
    generator = torch.Generator().manual_seed(length + heads)
    return [
        torch.randn(batch, length, count, width, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def oracle(documents, q, k, v, grad_out, scale):
    segment_ids = torch.zeros(q.shape[:2], dtype=torch.int64)
    for row, lengths in enumerate(documents):
        ids = torch.repeat_interleave(torch.arange(len(lengths)) + 1, torch.tensor(lengths).long())
        segment_ids[row, : len(ids)] = ids
    q, k, v = (tensor.to(torch.float64).requires_grad_() for tensor in (q, k, v))
    out = dense_attention(q, k, v, segment_ids, scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.to(torch.float64))]


def errors(case, scale=0.3):
    documents, length, size, layout, heads, kv_heads, width, dtype = case
    tensors = inputs(len(documents), length, heads, kv_heads, width, getattr(torch, dtype))
    plans = [plan_ring(lengths, length, size, layout) for lengths in documents]
    got = simulate(plans, *tensors, TritonKernel(), scale)
    assert got[0].dtype == got[1].dtype == tensors[0].dtype
    wanted = oracle(documents, *tensors, scale)
    return {
        name: ((one.to(tensors[0].dtype) - other).abs().max() / other.abs().max()).item()
        for name, one, other in zip(NAMES, got, wanted, strict=True)
    }


def bits_changed(changed, layout):
    """How many elements of other documents, and NaN-free ones of this, one of only NaN makes."""
    lengths = (60, 129, 1, 20)
    plans = [plan_ring(lengths, 215, 2, layout)]
    tensors = inputs(1, 215, 1, 1, 32, torch.float32)
    before = simulate(plans, *tensors, TritonKernel())
    start = sum(lengths[:changed])
    part = slice(start, start + lengths[changed])
    for tensor in tensors:
        tensor[:, part] = torch.nan
    counts = {}
    after = simulate(plans, *tensors, TritonKernel())
    for name, one, other in zip(NAMES, before, after, strict=True):
        kept = (one == other).clone()
        kept[:, part] = other[:, part].isnan()
        counts[name] = int((~kept).sum())
    return counts


def padding_seen():
    """How many tokens of padding have an lse, and how many others have none."""
    rows = group_rows([plan_ring([70], 80, 1)])
    q, k, v, _ = inputs(1, 80, 1, 1, 32, torch.float32)
    forward = TritonKernel().forward(0, rows, q, 1.0)
    forward.step(0, k, v)
    unseen = forward.finish()[1][0, 0] == -torch.inf
    return {"padding": int((~unseen[70:]).sum()), "tokens": int(unseen[:70].sum())}


def main():
    torch.set_num_threads(1)
    assert triton_missing(torch.device("cpu")) is None
    results = {name: errors(case) for name, case in CASES.items()}
    results["scale below 0"] = errors(([(70,)], 80, 2, "zigzag", 1, 1, 32, "float32"), -0.2)
    for changed, layout in ((0, "zigzag"), (1, "block_cyclic"), (3, "striped")):
        results[f"document {changed} is NaN, {layout}"] = bits_changed(changed, layout)
    results["padding"] = padding_seen()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
