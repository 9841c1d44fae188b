"""CPU time of ring plans: 1Mi tokens, 1,000 documents, every layout by name and by "auto".

A plan is what one rank needs before its first step: ``plan_ring``, the rank's transfers and its
rectangles, all steps. Beside it stands what the backend's kernel makes of the plan as the steps of
its first call come, once for each row of documents: pieces for cpu, calls for flash, tables of
tiles for triton, forward and backward. Each figure is the least over fresh plans, on one thread;
the process's own CPU time, so that a busy machine matters less.

    python benchmarks/ring_plan.py --repetitions 12      # a minute or two; writes results/
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import date
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from ringworld_model.ring import RingPlan, plan_ring
from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.clusters import cut_step
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.tiles import key_table, query_table
from ringworld_model.ring.triton_launch import launches
from ringworld_model.ring.varlen import varlen_calls

TOKENS, DOCUMENTS = 1 << 20, 1000
BACKENDS = ("cpu", "flash", "triton")
CPU = torch.device("cpu")
KERNEL = CpuKernel()


def even(seed: int) -> list[int]:
    """Equal documents, one of them a token longer, for each seed to be another plan."""
    lengths = [TOKENS // DOCUMENTS] * DOCUMENTS
    lengths[seed % DOCUMENTS] += 1 + seed // DOCUMENTS
    return lengths


def packed(seed: int) -> list[int]:
    """A row cut at random places."""
    cuts = sorted(random.Random(seed).sample(range(1, TOKENS), DOCUMENTS - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, TOKENS], strict=True)]


def long_tail(seed: int) -> list[int]:
    """Pareto lengths: mostly some hundred tokens, and a few that hold a good part of the row."""
    rng = random.Random(seed)
    weights = [rng.paretovariate(1.1) for _ in range(DOCUMENTS)]
    lengths = [max(1, int(0.99 * TOKENS * weight / sum(weights))) for weight in weights]
    lengths[lengths.index(max(lengths))] += TOKENS - sum(lengths)
    return lengths


KINDS: dict[str, Callable[[int], list[int]]] = {
    "random": packed,
    "long tail": long_tail,
    "equal": even,
}


def prepare(plan: RingPlan, rank: int, backend: str) -> None:
    """Make what a backend's kernel makes of a plan, for bf16 and heads of 128, on Hopper."""
    tiles = launches(128, torch.bfloat16, (9, 0))
    for step in range(plan.ring_size):
        if backend == "cpu":
            for backward in (False, True):
                cut_step(KERNEL.pieces, torch.bfloat16, plan, rank, step, backward)
        elif backend == "flash":
            varlen_calls(plan, rank, step, 1, CPU)
        else:
            where = (plan, rank, step)
            query_table(*where, (tiles.forward.tile_q, tiles.forward.tile_k), CPU)
            key_table(*where, (tiles.keys.tile_k, tiles.keys.tile_q), CPU)
            query_table(*where, (tiles.queries.tile_q, tiles.queries.tile_k), CPU)


def measure(
    kind: str, ring: int, layout: str, backend: str, seeds: Iterable[int]
) -> dict[str, Any]:
    """Milliseconds of CPU time, each the least over plans of ``seeds``, none of them used before.

    A plan is found again by its documents, whatever layout or backend it was made for.
    """
    rank = ring - 1
    best = dict.fromkeys(("plan_ring", "travel", "rectangles", "plan", "kernel"), float("inf"))
    for seed in seeds:
        lengths = KINDS[kind](seed)
        times = [time.process_time()]
        plan = plan_ring(lengths, TOKENS, ring, layout, backend=backend)
        times.append(time.process_time())
        plan.travel(rank)
        times.append(time.process_time())
        for step in range(ring):
            plan.rectangles(rank, step)
        times.append(time.process_time())
        prepare(plan, rank, backend)
        times.append(time.process_time())
        parts = [1e3 * (end - begin) for begin, end in zip(times, times[1:], strict=False)]
        whole = 1e3 * (times[3] - times[0])
        for name, value in zip(best, (*parts[:3], whole, parts[3]), strict=True):
            best[name] = min(best[name], value)
    row: dict[str, Any] = {"documents": kind, "ring": ring, "asked": layout, "backend": backend}
    return row | {"layout": plan.layout} | {name: round(value, 2) for name, value in best.items()}


def write(out: Path, result: dict[str, Any]) -> None:
    """Write the figures as JSON and as a table."""
    lines = [f"# CPU time of ring plans, {result['date']}", ""]
    lines += [
        f"{TOKENS} tokens, {DOCUMENTS} documents; {result['machine']}, one thread. Load average "
        f"before and after: {result['load']}. Least of {result['repetitions']} fresh plans, ms of "
        "CPU time.",
        "",
        "plan: what one rank (the last) needs before its first step, plan_ring + travel +",
        "rectangles. kernel: what the kernel makes of it while the steps of its first call run",
        "(forward and backward, bf16, heads of 128; triton's token ranges, which a GPU makes on",
        "the device, included). Documents that repeat cost neither.",
        "",
        "`python benchmarks/ring_plan.py`",
        "",
        "| documents | ring | layout asked | backend | taken | plan_ring | travel | rectangles | "
        "plan | kernel |",
        "| --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        figures = ("plan_ring", "travel", "rectangles", "plan", "kernel")
        lines.append(
            f"| {row['documents']} | {row['ring']} | {row['asked']} | {row['backend']} | "
            f"{row['layout']} | " + " | ".join(f"{row[name]:.1f}" for name in figures) + " |"
        )
    path = out / f"ring_plan-{result['date']}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--rings", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Layouts of many flash calls, which are asked for here.
    load = [os.getloadavg()[0]]
    rows, seeds = [], count()
    for kind in KINDS:
        for ring in options.rings:
            for layout in (*LAYOUTS, "auto"):
                for backend in BACKENDS:
                    rows.append(
                        measure(kind, ring, layout, backend, islice(seeds, options.repetitions))
                    )
                    print(json.dumps(rows[-1]), flush=True)
    load.append(os.getloadavg()[0])
    write(
        options.out,
        {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "load": ", ".join(f"{of:.1f}" for of in load),
            "repetitions": options.repetitions,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
