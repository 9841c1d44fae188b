"""Error of ring attention against fp64, by ring size: what the precision of the sums costs.

One process computes every rank's steps in turn, so that rings of up to 64 fit any machine. The
blocks, the plan and the merge are the package's own; only the transfers are left out, and the order
of every sum is the ring's. Three ways of keeping the running sums (out, dQ, dK, dV) are compared:

    fp32         ours: blocks and sums in fp32
    bf16 blocks  the result of each ring step is rounded to bf16, the sums are in fp32
    bf16         the result of each ring step and each sum is rounded to bf16

    python benchmarks/ring_error.py            # minutes on two cores; writes results/ and the plot
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from datetime import date
from pathlib import Path

import torch

from ringworld_model.ring import plan_ring, ring_attention
from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.merge import merge_
from ringworld_model.ring.plan import RingPlan
from ringworld_model.ring.rectangle import Rectangle
from ringworld_model.ring.reference import ReferenceKernel

ROOT = Path(__file__).resolve().parent
TENSORS = ("out", "dq", "dk", "dv")
SUMS = ("fp32", "bf16 blocks", "bf16")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CURVES = [("bf16", sums) for sums in SUMS] + [("fp32", "fp32"), ("fp32", "bf16")]
"""What is measured: (dtype of q, k, v and the gradient of out; dtype of the sums)."""
HEADS, KV_HEADS, HEAD_DIM = 2, 1, 64
LAYOUTS = {"dense": "zigzag", "packed": "block_cyclic"}

KERNEL = CpuKernel()

Tensors = tuple[torch.Tensor, ...]


def document_lengths(packing: str, length: int) -> list[int]:
    """One document, or as many as make each 900 tokens long on average."""
    if packing == "dense":
        return [length]
    cuts = sorted(random.Random(1).sample(range(1, length), max(2, length // 900) - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]


def draw(length: int, dtype: torch.dtype) -> Tensors:
    """q, k, v and the gradient of out, [1, S, heads, D], normal."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, length, heads, HEAD_DIM, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )


def simulate(plan: RingPlan, inputs: Tensors, sums: str) -> Tensors:
    """out, dq, dk, dv as the ring of ``plan`` computes them; rows [1, S, heads, D]."""
    ring = plan.ring_size
    shares = [[_cut(plan, whole, rank) for whole in inputs] for rank in range(ring)]
    outs, lses = [], []
    for rank, (q, *_) in enumerate(shares):
        out, lse = torch.zeros(q.shape), torch.full(q.shape[:-1], -torch.inf)
        for step in range(ring):
            k, v = shares[(rank - step) % ring][1:3]
            if sums == "fp32":
                _forward(plan, rank, step, (q, k, v), out, lse)
                continue
            # One call of a kernel that keeps fp32 inside, and gives its result in bf16.
            block, block_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
            _forward(plan, rank, step, (q, k, v), block, block_lse)
            merge_(out, lse, _rounded(block), block_lse)
            if sums == "bf16":
                out = _rounded(out)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    totals = [[torch.zeros(tensor.shape) for tensor in share[:3]] for share in shares]
    # Step by step over all ranks: a block's gradients gather each rank's share as they pass it.
    for step in range(ring):
        for rank, (q, _, _, grad) in enumerate(shares):
            source = (rank - step) % ring
            k, v = shares[source][1:3]
            blocks = _backward(plan, rank, step, (grad, q, k, v, outs[rank], lses[rank]))
            for block, owner, name in zip(blocks, (rank, source, source), range(3), strict=True):
                total = totals[owner][name]
                total += block if sums == "fp32" else _rounded(block)
                if sums == "bf16":
                    total.copy_(_rounded(total))
    found = [outs, *([total[name] for total in totals] for name in range(3))]
    like = (inputs[0], *inputs[:3])
    return tuple(_place(plan, parts, one) for parts, one in zip(found, like, strict=True))


def _forward(
    plan: RingPlan, rank: int, step: int, qkv: Tensors, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge one ring step of one rank into ``out`` and ``lse``."""
    q, k, v = qkv
    for q0, q1, k0, k1, diagonal in _pieces(plan, rank, step, q.dtype, backward=False):
        block = KERNEL.forward(
            q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], diagonal, HEAD_DIM**-0.5
        )
        merge_(out[:, :, q0:q1], lse[:, :, q0:q1], *block)


def _backward(plan: RingPlan, rank: int, step: int, saved: Tensors) -> Tensors:
    """dq, dk, dv in fp32 of one ring step of one rank; lse is the last of ``saved``."""
    grad, q, k, v, out, lse = saved
    totals = tuple(torch.zeros(tensor.shape) for tensor in (q, k, v))
    for q0, q1, k0, k1, diagonal in _pieces(plan, rank, step, q.dtype, backward=True):
        rows, keys = (..., slice(q0, q1), slice(None)), (..., slice(k0, k1), slice(None))
        blocks = KERNEL.backward(
            *(grad[rows], q[rows], k[keys], v[keys], out[rows], lse[..., q0:q1]),
            diagonal,
            HEAD_DIM**-0.5,
        )
        for total, block, where in zip(totals, blocks, (rows, keys, keys), strict=True):
            total[where] += block
    return totals


def _pieces(
    plan: RingPlan, rank: int, step: int, dtype: torch.dtype, backward: bool
) -> list[Rectangle]:
    """A ring step's rectangles as the kernel cuts them."""
    wholes = plan.rectangles(rank, step)
    return [piece for whole in wholes for piece, _ in KERNEL.pieces(dtype, whole, backward)]


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def _cut(plan: RingPlan, whole: torch.Tensor, rank: int) -> torch.Tensor:
    """[1, S, heads, D] -> the rank's [1, heads, T, D]."""
    indices = plan.local_indices(rank)
    local = whole[:, indices.clamp(max=plan.context_length - 1)]
    local[:, indices >= plan.context_length] = 0
    return local.transpose(1, 2).contiguous()


def _place(plan: RingPlan, parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    whole = torch.empty_like(like)
    for rank, part in enumerate(parts):
        indices = plan.local_indices(rank)
        real = indices < plan.context_length
        whole[:, indices[real]] = part.transpose(1, 2)[:, real].to(whole.dtype)
    return whole


def exact(lengths: list[int], inputs: Tensors) -> Tensors:
    """The same in fp64, by torch's kernel on one rank; ``_check_exact`` holds it to matrices."""
    plan = plan_ring(lengths, sum(lengths), 1)
    return _differentiated(plan, tuple(tensor.double() for tensor in inputs))


def _differentiated(plan: RingPlan, inputs: Tensors) -> Tensors:
    q, k, v, grad = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = ring_attention(*leaves, plan=plan)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def errors(found: Tensors, wanted: Tensors) -> dict[str, float]:
    """Norm of the difference over the norm, of each tensor."""
    return {
        name: float(
            torch.linalg.vector_norm(one.double() - other) / torch.linalg.vector_norm(other)
        )
        for name, one, other in zip(TENSORS, found, wanted, strict=True)
    }


def check() -> None:
    """The simulation is the package's attention, and fp64 is right, before anything is said."""
    lengths = [300, 1, 211]
    inputs = draw(512, torch.bfloat16)
    plan = plan_ring(lengths, 512, 1)
    for one, other in zip(
        simulate(plan, inputs, "fp32"), _differentiated(plan, inputs), strict=True
    ):
        if not torch.equal(one, other):
            raise AssertionError("the simulation of one rank is not ring_attention")
    inputs = draw(256, torch.float64)
    q, k, v, grad = (tensor.transpose(1, 2) for tensor in inputs)
    kernel = ReferenceKernel()
    out, lse = kernel.forward(q, k, v, True, HEAD_DIM**-0.5)
    gradients = kernel.backward(grad, q, k, v, out, lse, True, HEAD_DIM**-0.5)
    wanted = tuple(tensor.transpose(1, 2) for tensor in (out, *gradients))
    worst = max(errors(exact([256], inputs), wanted).values())
    if worst > 1e-13:
        raise AssertionError(f"fp64 is off by {worst:.1e}")


def measure(length: int, ring_sizes: list[int]) -> list[dict[str, object]]:
    """A record for each packing, dtype, way of summing and ring size."""
    records: list[dict[str, object]] = []
    for packing, layout in LAYOUTS.items():
        lengths = document_lengths(packing, length)
        for dtype_name, dtype in DTYPES.items():
            inputs = draw(length, dtype)
            wanted = exact(lengths, inputs)
            for ring_size in ring_sizes:
                plan = plan_ring(lengths, length, ring_size, layout)
                for sums in [sums for inputs_in, sums in CURVES if inputs_in == dtype_name]:
                    began = time.perf_counter()
                    found = errors(simulate(plan, inputs, sums), wanted)
                    about = {"rows": packing, "inputs": dtype_name, "sums": sums}
                    record = {**about, "ring_size": ring_size, "layout": layout, **found}
                    records.append(record)
                    seconds = time.perf_counter() - began
                    shown = "  ".join(f"{name} {found[name]:.2e}" for name in TENSORS)
                    print(
                        f"{packing:7}{dtype_name:5}{sums:12}{ring_size:4}  {shown}  {seconds:.1f} s"
                    )
    return records


def table(records: list[dict[str, object]], about: dict[str, object]) -> str:
    """The records as markdown."""
    lines = [
        f"# Error of ring attention by ring size, {about['date']}",
        "",
        f"Relative norm error against fp64 on the same inputs. {about['length']} tokens, {HEADS} "
        f"query heads, {KV_HEADS} key head, head_dim {HEAD_DIM}, normal inputs; "
        f"{about['machine']}, torch {about['torch']}. `python benchmarks/ring_error.py`",
        "",
        "| rows | inputs | sums | ring | out | dQ | dK | dV |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        cells = [str(record[key]) for key in ("rows", "inputs", "sums", "ring_size")]
        cells += [f"{record[name]:.2e}" for name in TENSORS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(records: list[dict[str, object]], path: Path) -> None:
    """A column a tensor; rows: bf16 dense, bf16 packed, and fp32 dense with a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "ring_error", "font.size": 9, "svg.fonttype": "none"})
    styles = {
        "bf16": ("#c0392b", "-", "sums in bf16"),
        "bf16 blocks": ("#e08e3c", "--", "blocks in bf16, sums in fp32"),
        "fp32": ("#1f6fb2", "-", "sums in fp32 (ours)"),
    }
    panels = [("dense", "bf16"), ("packed", "bf16"), ("dense", "fp32")]
    figure, axes = plt.subplots(3, 4, figsize=(11, 7.6), sharex=True, sharey="row")
    sizes = sorted({int(str(record["ring_size"])) for record in records})
    for row, (packing, inputs) in zip(axes, panels, strict=True):
        for panel, name in zip(row, TENSORS, strict=True):
            for sums, (colour, line, label) in styles.items():
                values = [
                    record[name]
                    for record in records
                    if (record["rows"], record["inputs"], record["sums"]) == (packing, inputs, sums)
                ]
                if values:
                    panel.plot(sizes, values, line, color=colour, label=label, marker="o", ms=3)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            shown = name if name == "out" else f"d{name[1].upper()}"
            panel.set_title(f"{shown}, {inputs} inputs, {packing}")
        if inputs == "fp32":
            row[0].set_yscale("log")
        else:
            row[0].set_ylim(bottom=0)
            row[0].ticklabel_format(axis="y", style="sci", scilimits=(-3, -3))
        row[0].set_ylabel("error against fp64")
    for panel in axes[-1]:
        panel.set_xlabel("ring size")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Measure, write the dated table and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the row")
    parser.add_argument("--ring-sizes", default="1,2,4,8,16,32,64")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--plot", type=Path, default=ROOT.parent / "docs/images/ring_error.svg")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check()
    began = time.perf_counter()
    records = measure(options.length, [int(size) for size in options.ring_sizes.split(",")])
    about: dict[str, object] = {
        "date": date.today().isoformat(),
        "length": options.length,
        "machine": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"ring_error-{about['date']}"
    content = {"about": about, "records": records}
    (options.results / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.results / f"{name}.md").write_text(table(records, about))
    plot(records, options.plot)
    print(f"{about['seconds']} s; {options.results / name}.md, {options.plot}")


if __name__ == "__main__":
    main()
