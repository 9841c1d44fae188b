"""Ring attention on 2 CPU ranks, one thread each, against no communication at all and peers.

Forward and backward of causal attention, 8 heads of 64, one row. "ideal" splits the heads over the
ranks, so that nothing travels: one kernel call a document, in the inputs' dtype. All methods run in
the same processes, in an order that rotates; figures are the least over the repetitions, of CPU
seconds (both ranks, all threads), wall seconds (slower rank) and peak memory above the inputs.

    python benchmarks/ring_attention.py --lengths 8192 16384 --repetitions 3

Peers run where they can be imported, dense rows only:
    pip install --no-deps --target PEERS ring-flash-attn==0.1.8 yunchang==0.6.4
    python benchmarks/ring_attention.py --peers PEERS
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from documents import documents_of
from ring_attention_peers import BACKWARD, FORWARD, Inputs, Method, find_peers, peer, torch_ring

from ringworld_model.ring import RingPlan, RingStats, plan_ring, ring_attention
from ringworld_model.ring.rectangle import Rectangles
from ringworld_model.ring.varlen import group_rectangles

HEADS, WIDTH, RANKS = 8, 64, 2


def ideal(inputs: Inputs, documents: list[int], rank: int) -> Method:
    """Whole rows of half the heads: one kernel call a document."""
    mine = slice(rank * HEADS // RANKS, (rank + 1) * HEADS // RANKS)
    q, k, v, grad = (tensor[:, :, mine].clone().transpose(1, 2) for tensor in inputs)

    def run() -> Any:
        wholes = [torch.empty_like(tensor) for tensor in (q, q, k, v)]
        start = 0
        results = []
        for length in documents:
            part = (slice(None), slice(None), slice(start, start + length))
            out, lse = FORWARD(q[part], k[part], v[part], 0.0, True)
            wholes[0][part] = out
            results.append((part, out, lse))
            start += length
        for part, out, lse in results:
            gradients = BACKWARD(grad[part], q[part], k[part], v[part], out, lse, 0.0, True)
            for whole, gradient in zip(wholes[1:], gradients, strict=True):
                whole[part] = gradient
        return wholes

    return run


def ours(inputs: Inputs, documents: list[int], rank: int, stats: RingStats) -> Method:
    """``ring_attention`` with the layout that auto chooses."""
    length = inputs[0].shape[1]
    plan = plan_ring(documents, length, RANKS, backend="cpu")
    indices = plan.local_indices(rank)
    cut = []
    for tensor in inputs:
        room = tensor.new_zeros(1, RANKS * plan.local_length, HEADS, WIDTH)
        room[:, :length] = tensor
        cut.append(room[:, indices].clone())
    grad = cut.pop()

    def run() -> Any:
        tensors = [tensor.detach().requires_grad_() for tensor in cut]
        out = ring_attention(*tensors, plan=plan, group=dist.group.WORLD, stats=stats)
        return out, torch.autograd.grad(out, tensors, grad)

    return run


def cpu_seconds() -> float:
    """User and system seconds of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory(field: str) -> int:
    """Bytes of a field of this process's status, such as VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def measure(method: Method, trim: bool) -> dict[str, float]:
    """One run: CPU and wall seconds, and peak bytes above what was there before.

    The peak is true only with ``trim``, else memory that an earlier method freed hides it; the
    seconds are true only without, for a training step finds its memory where the last left it.
    """
    if trim:
        ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began, spent = memory("VmRSS"), time.perf_counter(), cpu_seconds()
    result = method()
    figures = {"cpu": cpu_seconds() - spent, "wall": time.perf_counter() - began}
    if trim:
        figures = {"peak": float(memory("VmHWM") - before)}
    del result
    return figures


def run_rank(rank: int, store: str, options: argparse.Namespace) -> None:
    """All cases on one rank; rank 0 writes what both measured."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(minutes=30),
    )
    sys.path.extend(options.peers)
    peers, missing = find_peers()
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for dtype in options.dtypes:
            for kind in options.kinds:
                rows += run_case(rank, length, dtype, kind, options.repetitions, peers, missing)
    if rank == 0:
        Path(store + ".json").write_text(json.dumps({"rows": rows, "missing": missing}))
    dist.barrier()  # nobody leaves while another still writes
    dist.destroy_process_group()


def run_case(
    rank: int,
    length: int,
    dtype: str,
    kind: str,
    repetitions: int,
    peers: dict[str, Callable[..., Any]],
    missing: dict[str, str],
) -> list[dict[str, Any]]:
    """Every method on one row, in rotated order."""
    torch.manual_seed(0)
    shape = (1, length, HEADS, WIDTH)
    drawn = [torch.randn(shape).to(getattr(torch, dtype)) for _ in range(4)]
    inputs = (drawn[0], drawn[1], drawn[2], drawn[3])
    documents = documents_of("short" if kind == "packed" else kind, length)
    stats = RingStats()
    methods = {
        "ideal": ideal(inputs, documents, rank),
        "ringworld": ours(inputs, documents, rank, stats),
    }
    if kind == "dense":
        methods["torch context_parallel"] = torch_ring(inputs, rank)
        methods |= {name: peer(function, inputs, rank) for name, function in peers.items()}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    peaks: dict[str, float] = {}
    for repetition in range(repetitions + 1):  # the first warms up, and gives the peak
        names = list(methods)
        names = names[repetition % len(names) :] + names[: repetition % len(names)]
        for name in names:
            if name not in methods:
                continue
            stats.reset()
            try:
                one = measure(methods[name], trim=repetition == 0)
            except Exception as error:
                # Both ranks run the same code on the same shapes, so both fail.
                missing[name] = f"{dtype} {kind}: {type(error).__name__}: {error}"[:300]
                del methods[name]
                continue
            if name == "ringworld":
                one |= {"exposed_wait": stats.wait_seconds, "sent": float(stats.bytes_sent)}
            if repetition == 0:
                peaks[name] = one["peak"]
            else:
                figures[name].append(one)
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, (figures, peaks))
    rows = []
    for name, ones in figures.items():
        if not ones:
            continue
        both = [part[0][name] for part in gathered]
        row: dict[str, Any] = {"tokens": length, "dtype": dtype, "kind": kind, "method": name}
        row["cpu"] = min(sum(ranks[at]["cpu"] for ranks in both) for at in range(len(ones)))
        row["wall"] = min(max(ranks[at]["wall"] for ranks in both) for at in range(len(ones)))
        row["peak"] = max(part[1][name] for part in gathered)
        if name == "ringworld":
            row["exposed_wait"] = min(
                max(ranks[at]["exposed_wait"] for ranks in both) for at in range(len(ones))
            )
            row["sent"] = max(ranks[0]["sent"] for ranks in both)
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)
    return rows


def visited_area(plan: RingPlan) -> float:
    """Area of the 128 x 128 tiles that hold a visible pair over the visible pairs."""
    area = 0
    for rank in range(plan.ring_size):
        for step in range(plan.ring_size):
            tiles: set[tuple[int, int]] = set()
            for q0, q1, k0, k1, diagonal in plan.rectangles(rank, step):
                for row in range(q0 // 128, (q1 - 1) // 128 + 1):
                    last = min(q1, (row + 1) * 128) - 1
                    end = min(k1, k0 + last - q0 + 1) if diagonal else k1
                    tiles.update((row, col) for col in range(k0 // 128, (end - 1) // 128 + 1))
            area += len(tiles) * 128 * 128
    return area / int(plan.pairs.sum())


def balance_table() -> list[dict[str, Any]]:
    """Counted, not timed: of packed 64Ki rows, in the layout that auto takes for each backend."""
    rows = []
    for kind, name in (("short", "72 short"), ("long tail", "11 long-tail")):
        documents = documents_of(kind, 65536)
        for size in (4, 8):
            for backend in ("triton", "flash", "cpu"):
                plan = plan_ring(documents, 65536, size, backend=backend)
                rows.append(
                    {
                        "documents": name,
                        "ring": size,
                        "backend": backend,
                        "layout": plan.layout,
                        "balance": plan.imbalance,
                        "area": visited_area(plan),
                        "calls": busiest(plan, lambda found: len(found)),
                        "flash_calls": busiest(plan, lambda found: len(group_rectangles(found))),
                    }
                )
    return rows


def busiest(plan: RingPlan, count: Callable[[Rectangles], int]) -> int:
    """The most calls that a rank makes in a forward pass."""
    places = range(plan.ring_size)
    return max(sum(count(plan.rectangles(rank, step)) for step in places) for rank in places)


def write(out: Path, result: dict[str, Any]) -> None:
    """Write the figures as JSON and as tables."""
    lines = [f"# Ring attention, {result['date']}", ""]
    lines += [f"{result['machine']}. Load average before and after: {result['load']}.", ""]
    lines += [
        "Forward + backward, 8 heads x 64, causal, 2 ranks, one thread each. CPU: both ranks;",
        "wall: the slower rank; peak: memory above the inputs, a rank. Least of "
        f"{result['repetitions']} repetitions.",
        "",
        "| tokens | dtype | row | method | CPU s | x ideal | wall s | peak MiB |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    base: dict[tuple[Any, ...], float] = {}
    for row in result["rows"]:
        case = (row["tokens"], row["dtype"], row["kind"])
        base.setdefault(case, row["cpu"])
        lines.append(
            f"| {row['tokens']} | {row['dtype']} | {row['kind']} | {row['method']} "
            f"| {row['cpu']:.2f} | {row['cpu'] / base[case]:.3f} | {row['wall']:.2f} "
            f"| {row['peak'] / 2**20:.0f} |"
        )
    lines += ["", "Exposed wait (slower rank) and bytes sent (a rank, most), ringworld:", ""]
    lines += [
        f"- {row['tokens']} {row['dtype']} {row['kind']}: {row['exposed_wait']:.3f} s of "
        f"{row['wall']:.2f} s; {row['sent'] / 2**20:.1f} MiB"
        for row in result["rows"]
        if "sent" in row
    ]
    if result["missing"]:
        lines += ["", "Not run: " + "; ".join(f"{k} ({v})" for k, v in result["missing"].items())]
    lines += [
        "",
        "Plan, 64Ki tokens, counted: slowest rank a step over the mean; calls of the busiest rank;",
        "for triton, which visits whole tiles, their area over visible pairs.",
        "",
        "| documents | ring | backend | layout | balance | calls | area |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    calls = {"cpu": "calls", "flash": "flash_calls"}
    for row in result["balance"]:
        backend = row["backend"]
        made = row[calls[backend]] if backend in calls else row["ring"]
        area = f"{row['area']:.3f}" if backend == "triton" else ""
        lines.append(
            f"| {row['documents']} | {row['ring']} | {backend} | {row['layout']} "
            f"| {row['balance']:.3f} | {made} | {area} |"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Measure, then write a dated table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--kinds", nargs="+", default=["dense", "packed"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=[], help="folders with the peers")
    parser.add_argument("--out", type=Path, help="path without a suffix")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"rows": [], "missing": {}}
    if options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder, "store"))
            mp.spawn(run_rank, (store, options), RANKS)
            result = json.loads(Path(store + ".json").read_text())
    result |= {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "load": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
        "repetitions": options.repetitions,
        "balance": balance_table(),
    }
    default = Path(__file__).parent / "results" / f"ring_attention-{result['date']}"
    write(options.out or default, result)


if __name__ == "__main__":
    main()
