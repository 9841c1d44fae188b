"""Ring attention on one CUDA GPU: right first, then fast.

Needs torch, Triton and ``ringworld_model`` only:

    PYTHONPATH=model python benchmarks/ring_gpu.py

Sections: ``right`` compares every backend with fp64; ``dense`` times one long document against
torch's FA2 and the best kernel at hand; ``packed`` compares packed rows with what their visible
pairs would cost at the dense rate; ``ring`` runs all ranks of a ring one after another on the one
device and compares with one call of equal work; ``graph`` does so with CUDA graphs, which leaves
the host's part of a launch out. Times are medians on the device, forward and backward apart, the
L2 cache overwritten before each. A kernel that fails is listed, and the rest goes on. ``--device
cpu --quick`` runs the same code at sizes that prove nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from documents import documents_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringworld_model.ring import RingPlan, plan_ring
from ringworld_model.ring.backend import choose_backend, optional_kernels, ring_kernel
from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.block_flash import FlashKernel
from ringworld_model.ring.flash_libraries import MAKERS
from ringworld_model.ring.flash_ops import first_proved
from ringworld_model.ring.kernel import RingKernel, group_rows
from ringworld_model.ring.layout import LAYOUTS
from ringworld_model.ring.reference import dense_attention
from ringworld_model.ring.simulation import simulate
from ringworld_model.ring.varlen_op import BlockwiseOp

SECTIONS = ("right", "dense", "packed", "ring", "graph")
NAMES = ("out", "dq", "dk", "dv")
FP32_LIMIT = 5e-6
ROOM = 1.01
"""Two kernels that round alike differ by this much in the norm of their errors."""
PACKED_BAR = 0.85
RING_BARS = {"dense": 0.90, "short": 0.76, "long tail": 0.76}
"""What the best published ring keeps of one call's speed."""
Row = dict[str, Any]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    lengths: tuple[int, ...] = (8192, 32768, 131072)
    widths: tuple[int, ...] = (128, 64)
    hidden: int = 2048
    packed_length: int = 65536
    rings: tuple[int, ...] = (2, 4, 8)
    check_length: int = 1500
    check_rings: tuple[int, ...] = (1, 2, 4)
    check_heads: tuple[tuple[int, int, int], ...] = ((4, 4, 64), (8, 2, 128), (7, 1, 64))
    """Query heads, key heads, width."""
    seconds: float = 0.4
    """For each figure; three calls at least, 50 at most."""


QUICK = Sizes(lengths=(8192, 32768), widths=(128,), packed_length=32768, rings=(4,), seconds=0.2)
DRY = Sizes(
    lengths=(256,),
    widths=(32,),
    hidden=64,
    packed_length=1024,
    rings=(2,),
    check_length=300,
    check_rings=(2,),
    check_heads=((4, 2, 32),),
    seconds=0.0,
)


class Bench:
    """Kernels and sizes, and what was found."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        """Find out which kernels run."""
        self.device, self.sizes = device, sizes
        self.rows: dict[str, list[Row]] = {section: [] for section in SECTIONS}
        self.failed: list[str] = []
        self.kernels: dict[str, tuple[str, RingKernel]] = {}
        if device.type == "cpu":
            self.kernels["cpu"] = ("cpu", ring_kernel("cpu"))
            self.kernels["flash, blockwise"] = ("flash", FlashKernel(BlockwiseOp(CpuKernel())))
            return
        with self.caught("triton"):
            choose_backend("cuda", "bfloat16", "triton", 128)
            self.kernels["triton"] = ("triton", ring_kernel("triton"))
        for make in reversed(MAKERS):
            with self.caught(make.__name__):
                op, _ = first_proved((make,), device, torch.bfloat16, 128)
                self.kernels[f"flash, {op.name}"] = ("flash", FlashKernel(op))

    @contextmanager
    def caught(self, what: str) -> Iterator[None]:
        """Go on where one kernel fails, and say so."""
        try:
            yield
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = (str(error).strip() or "no message").splitlines()[0][:300]
            where = f"{Path(last.filename).name}:{last.lineno}"
            self.failed.append(f"{what}: {type(error).__name__}: {said} ({where})")
            print("failed:", self.failed[-1], flush=True)

    def add(self, section: str, row: Row) -> None:
        """Keep and show a row."""
        self.rows[section].append(row)
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print(section, *(f"{k}={v}" for k, v in shown.items()), flush=True)

    def seconds(self, call: Callable[[], Any], graph: bool = False) -> float:
        """Median seconds of a call on the device; of its CUDA graph, where asked for."""
        call()
        if self.device.type == "cpu":
            return statistics.median(self._wall(call) for _ in range(3))
        if graph:
            call = self._captured(call)
        count = min(50, max(3, int(self.sizes.seconds / self._wall(call))))
        # Overwriting the cache also keeps the device busy while the host launches the call.
        cache = torch.empty(256 << 20, dtype=torch.int8, device=self.device)
        taken = []
        for _ in range(count):
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            taken.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) / 1000 for begin, end in taken)

    def _wall(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, host and device."""
        if self.device.type != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if self.device.type != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def peak(self, call: Callable[[], Any]) -> int:
        """Peak bytes above what is allocated now."""
        if self.device.type == "cpu":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def draw(
    device: torch.device, length: int, heads: Sequence[int], width: int, dtype: torch.dtype
) -> Inputs:
    """q, k, v and the gradient of out, [1, length, heads, width]."""
    generator = torch.Generator(device).manual_seed(length + width)
    q, k, v, grad = (
        torch.randn(1, length, count, width, generator=generator, device=device).to(dtype)
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    return q, k, v, grad


# --- right


def oracle(documents: list[int], inputs: Inputs) -> list[torch.Tensor]:
    """fp64 out, dq, dk, dv."""
    ids = torch.zeros(1, inputs[0].shape[1], dtype=torch.int32)
    real = torch.repeat_interleave(torch.arange(len(documents)) + 1, torch.tensor(documents))
    ids[0, : len(real)] = real.int()
    q, k, v = (tensor.double().requires_grad_() for tensor in inputs[:3])
    out = dense_attention(q, k, v, ids.to(q.device))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].double())]


def one_call_each(documents: list[int], inputs: Inputs, backend: SDPBackend) -> list[torch.Tensor]:
    """out, dq, dk, dv of one call of torch's kernel a document."""
    found: list[list[torch.Tensor]] = []
    start = 0
    for length in documents:
        part = [tensor[:, start : start + length].transpose(1, 2) for tensor in inputs]
        q, k, v = (tensor.detach().requires_grad_() for tensor in part[:3])
        with sdpa_kernel(backend):
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            grads = torch.autograd.grad(out, (q, k, v), part[3])
        found.append([tensor.transpose(1, 2) for tensor in (out.detach(), *grads)])
        start += length
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


def norm_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the error over the norm."""
    return float((got.double() - wanted).norm() / wanted.norm())


def right(bench: Bench) -> None:
    """Every backend against fp64: bf16 no worse than one FA2 call a document, fp32 <= 5e-6."""
    length = bench.sizes.check_length
    packed = [1, length // 3, 129, length - length // 3 - 130]
    for kind, documents in (("dense", [length]), ("packed", packed)):
        for *heads, width in bench.sizes.check_heads:
            for dtype in (torch.bfloat16, torch.float32):
                inputs = draw(bench.device, length, heads, width, dtype)
                wanted = oracle(documents, inputs)
                bars = dict.fromkeys(NAMES, FP32_LIMIT)
                if dtype == torch.bfloat16:
                    bars = dict.fromkeys(NAMES, 5e-3)  # where FA2 cannot say
                    with bench.caught(f"right, FA2 in torch, {kind}, {heads} x {width}"):
                        one = one_call_each(documents, inputs, SDPBackend.FLASH_ATTENTION)
                        errors = [norm_error(a, b) for a, b in zip(one, wanted, strict=True)]
                        bars = dict(zip(NAMES, errors, strict=True))
                for name, (backend, kernel) in bench.kernels.items():
                    if dtype == torch.float32 and backend == "flash" and bench.device.type != "cpu":
                        continue
                    for size in bench.sizes.check_rings:
                        with bench.caught(f"right, {name}, {kind}, {heads} x {width}, ring {size}"):
                            plan = plan_ring(documents, length, size, backend=backend)
                            got = simulate(plan, *inputs, kernel)
                            errors = {
                                n: norm_error(a.to(dtype), b)
                                for n, a, b in zip(NAMES, got, wanted, strict=True)
                            }
                            worst = max(errors, key=lambda n: errors[n] / bars[n])
                            bench.add(
                                "right",
                                {
                                    "kernel": name,
                                    "row": kind,
                                    "heads": f"{heads[0]}/{heads[1]}",
                                    "head_dim": width,
                                    "dtype": str(dtype).removeprefix("torch."),
                                    "ring": size,
                                    "layout": plan.layout,
                                    **errors,
                                    "bar": bars[worst],
                                    "worst": worst,
                                    "of_bar": errors[worst] / bars[worst],
                                    "pass": errors[worst] <= bars[worst] * ROOM,
                                },
                            )
    for name, (backend, kernel) in bench.kernels.items():
        with bench.caught(f"isolation, {name}"):
            isolation(bench, name, backend, kernel)


def isolation(bench: Bench, name: str, backend: str, kernel: RingKernel) -> None:
    """A document of NaN changes no bit of another's results."""
    lengths = [150, 129, 1, 127, 60]
    inputs = draw(bench.device, sum(lengths) + 13, (4, 2), 64, torch.bfloat16)
    part = slice(150, 279)
    # Flash ops sum dq in any order otherwise.
    torch.use_deterministic_algorithms(True)
    try:
        for layout in LAYOUTS:
            plan = plan_ring(lengths, sum(lengths) + 13, 3, layout)
            before = simulate(plan, *inputs, kernel)
            broken = tuple(tensor.clone() for tensor in inputs)
            for tensor in broken:
                tensor[:, part] = torch.nan
            after = simulate(plan, *broken, kernel)
            same = all(
                torch.equal(one[:, some], other[:, some])
                for one, other in zip(before, after, strict=True)
                for some in (slice(0, 150), slice(279, None))
            )
            row = {"kernel": name, "row": "a document of NaN", "layout": layout, "pass": same}
            bench.add("right", row)
    finally:
        torch.use_deterministic_algorithms(False)


# --- speed


@dataclass
class Ring:
    """All ranks of a ring on one device, one after another; one rank is one call."""

    plan: RingPlan
    kernel: RingKernel
    inputs: Inputs

    def __post_init__(self) -> None:
        """Cut the inputs."""
        q = self.inputs[0]
        self.groups = group_rows([self.plan])
        self.scale = q.shape[-1] ** -0.5
        room = self.plan.ring_size * self.plan.local_length
        self.parts = []
        for rank in range(self.plan.ring_size):
            indices = self.plan.local_indices(rank).to(q.device)
            whole = (F.pad(of, (0, 0, 0, 0, 0, room - of.shape[1])) for of in self.inputs)
            self.parts.append([of[:, indices] for of in whole])

    def forward(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One rank's forward pass."""
        run = self.kernel.forward(rank, self.groups, self.parts[rank][0], self.scale)
        for step in range(self.plan.ring_size):
            run.step(step, *self.parts[(rank - step) % self.plan.ring_size][1:3])
        return run.finish()

    def backward(self, rank: int, out: torch.Tensor, lse: torch.Tensor) -> Any:
        """One rank's backward pass; its share of dk and dv begins with zeros, as in the ring."""
        q, k, _, grad = self.parts[rank]
        run = self.kernel.backward(rank, self.groups, grad, q, out, lse, self.scale)
        for step in range(self.plan.ring_size):
            sums = torch.zeros((2, *k.shape), dtype=torch.float32, device=k.device)
            run.step(step, *self.parts[(rank - step) % self.plan.ring_size][1:3], *sums)
        return run.finish(), sums.to(k.dtype)

    def measure(self, bench: Bench, graph: bool = False) -> dict[str, float]:
        """Seconds of all ranks' forward and backward passes; peak memory of rank 0's."""
        ranks = range(self.plan.ring_size)
        results = [self.forward(rank) for rank in ranks]

        def forward() -> None:
            for rank in ranks:
                self.forward(rank)

        def backward() -> None:
            for rank in ranks:
                self.backward(rank, *results[rank])

        return {
            "forward": bench.seconds(forward, graph),
            "backward": bench.seconds(backward, graph),
            "peak": bench.peak(lambda: self.backward(0, *self.forward(0))),
        }


def peers(bench: Bench) -> dict[str, SDPBackend]:
    """torch's own kernels."""
    if bench.device.type == "cpu":
        return {"FA2 in torch": SDPBackend.FLASH_ATTENTION}
    return {"FA2 in torch": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def measure_peer(bench: Bench, inputs: Inputs, backend: SDPBackend) -> dict[str, float]:
    """Seconds of one causal call of torch's kernel."""
    part = [tensor.transpose(1, 2).contiguous() for tensor in inputs]
    q, k, v = (tensor.detach().requires_grad_() for tensor in part[:3])

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def backward(out: torch.Tensor) -> Any:
        return torch.autograd.grad(out, (q, k, v), part[3], retain_graph=True)

    with sdpa_kernel(backend):
        out = forward()
        return {
            "forward": bench.seconds(forward),
            "backward": bench.seconds(lambda: backward(out)),
            "peak": bench.peak(lambda: backward(forward())),
        }


def rates(taken: dict[str, float], pairs: int, hidden: int) -> dict[str, float]:
    """TFLOP/s of visible pairs: two products forward, five backward."""
    forward, backward = taken["forward"], taken["backward"]
    unit = 2 * pairs * hidden / 1e12
    return {
        "forward_tflops": 2 * unit / forward,
        "backward_tflops": 5 * unit / backward,
        "both_tflops": 7 * unit / (forward + backward),
    }


def sequence(bench: Bench, length: int, width: int) -> Inputs:
    """Inputs of a timed row."""
    heads = bench.sizes.hidden // width
    return draw(bench.device, length, (heads, heads), width, torch.bfloat16)


def dense(bench: Bench) -> None:
    """One long document: one rank's passes against one call of torch's kernels."""
    for width in bench.sizes.widths:
        for length in bench.sizes.lengths:
            inputs = sequence(bench, length, width)
            pairs = length * (length + 1) // 2
            found: dict[str, Row] = {}
            for name, peer in peers(bench).items():
                with bench.caught(f"dense, {name}, {length}, {width}"):
                    found[name] = measure_peer(bench, inputs, peer)
            for name, (backend, kernel) in bench.kernels.items():
                with bench.caught(f"dense, {name}, {length}, {width}"):
                    plan = plan_ring([length], length, 1, "contiguous", backend=backend)
                    found[name] = Ring(plan, kernel, inputs).measure(bench)
            for taken in found.values():
                taken |= rates(taken, pairs, bench.sizes.hidden)
            for name, taken in found.items():
                row: Row = {"kernel": name, "tokens": length, "head_dim": width, **taken}
                for of in ("forward", "backward", "both"):
                    rate = taken[f"{of}_tflops"]
                    best = max(other[f"{of}_tflops"] for other in found.values())
                    row[f"{of}_of_best"] = rate / best
                    if "FA2 in torch" in found:
                        row[f"{of}_of_fa2"] = rate / found["FA2 in torch"][f"{of}_tflops"]
                bench.add("dense", row)


def packed(bench: Bench) -> None:
    """Packed rows on one rank, against their visible pairs at the kernel's own dense rate."""
    length = bench.sizes.packed_length
    for width in bench.sizes.widths:
        inputs = sequence(bench, length, width)
        for name, (backend, kernel) in bench.kernels.items():
            with bench.caught(f"packed, {name}, {width}"):
                whole = plan_ring([length], length, 1, "contiguous", backend=backend)
                taken = Ring(whole, kernel, inputs).measure(bench)
                base = rates(taken, int(whole.pairs.sum()), bench.sizes.hidden)
                for kind in ("short", "long tail"):
                    documents = documents_of(kind, length)
                    plan = plan_ring(documents, length, 1, "contiguous", backend=backend)
                    taken = Ring(plan, kernel, inputs).measure(bench)
                    got = rates(taken, int(plan.pairs.sum()), bench.sizes.hidden)
                    ratios = {
                        f"{of}_of_dense_rate": got[f"{of}_tflops"] / base[f"{of}_tflops"]
                        for of in ("forward", "backward", "both")
                    }
                    row: Row = {"kernel": name, "documents": f"{len(documents)} {kind}"}
                    row |= {"head_dim": width, **taken, **got, **ratios}
                    row["pass"] = ratios["both_of_dense_rate"] >= PACKED_BAR
                    bench.add("packed", row)


def ring(bench: Bench, section: str = "ring") -> None:
    """All ranks of a ring one after another, against one call of the same kernel and rows."""
    graph = section == "graph"
    length = bench.sizes.packed_length
    width = bench.sizes.widths[0]
    inputs = sequence(bench, length, width)
    for kind in ("dense", "short", "long tail"):
        documents = documents_of(kind, length)
        alone: dict[str, dict[str, float]] = {}
        for name, (backend, kernel) in bench.kernels.items():
            with bench.caught(f"ring of 1, {name}, {kind}"):
                plan = plan_ring(documents, length, 1, "contiguous", backend=backend)
                alone[name] = Ring(plan, kernel, inputs).measure(bench, graph)
        for name in alone:
            backend, kernel = bench.kernels[name]
            for size in bench.sizes.rings:
                auto = plan_ring(documents, length, size, backend=backend).layout
                for layout in (auto,) if graph else dict.fromkeys(("zigzag", auto)):
                    with bench.caught(f"{section} of {size}, {name}, {kind}, {layout}"):
                        plan = plan_ring(documents, length, size, layout, backend=backend)
                        taken = Ring(plan, kernel, inputs).measure(bench, graph)
                        row: Row = {
                            "kernel": name,
                            "documents": kind if kind == "dense" else f"{len(documents)} {kind}",
                            "ring": size,
                            "layout": layout + (" (auto)" if layout == auto else ""),
                            "imbalance": plan.imbalance,
                        }
                        times = {k: v for k, v in taken.items() if k != "peak"}
                        for of, seconds in times.items():
                            row[f"{of}_of_one_call"] = alone[name][of] / seconds
                        ratio = sum(alone[name][of] for of in times) / sum(times.values())
                        # Ranks wait for the slowest at each step.
                        row |= {"both_of_one_call": ratio, "balanced": ratio / plan.imbalance}
                        bench.add(section, {**row, **taken, "pass": ratio >= RING_BARS[kind]})


def graph(bench: Bench) -> None:
    """``ring`` in CUDA graphs."""
    ring(bench, "graph")


# --- tables

COLUMNS: dict[str, dict[str, str]] = {
    "right": {
        "kernel": "", "row": "", "heads": "", "head_dim": "", "dtype": "", "ring": "",
        "layout": "", "out": ".1e", "dq": ".1e", "dk": ".1e", "dv": ".1e", "of_bar": ".2f",
        "pass": "",
    },
    "dense": {
        "kernel": "", "tokens": "", "head_dim": "", "forward_tflops": ".0f",
        "backward_tflops": ".0f", "both_tflops": ".0f", "forward_of_fa2": ".2f",
        "backward_of_fa2": ".2f", "both_of_fa2": ".2f", "forward_of_best": ".2f",
        "backward_of_best": ".2f", "both_of_best": ".2f", "peak": "MiB",
    },
    "packed": {
        "kernel": "", "documents": "", "head_dim": "", "forward_tflops": ".0f",
        "backward_tflops": ".0f", "forward_of_dense_rate": ".0%",
        "backward_of_dense_rate": ".0%", "both_of_dense_rate": ".0%", "pass": "",
    },
    "ring": {
        "kernel": "", "documents": "", "ring": "", "layout": "", "forward_of_one_call": ".0%",
        "backward_of_one_call": ".0%", "both_of_one_call": ".0%", "imbalance": ".2f",
        "balanced": ".0%", "peak": "MiB", "pass": "",
    },
}  # fmt: skip
COLUMNS["graph"] = COLUMNS["ring"]


def table(rows: list[Row], columns: dict[str, str]) -> list[str]:
    """A markdown table."""

    def cell(row: Row, name: str, form: str) -> str:
        if name not in row:
            return ""
        return f"{row[name] / 2**20:.0f}" if form == "MiB" else format(row[name], form)

    heads = [f"{name} MiB" if form == "MiB" else name for name, form in columns.items()]
    lines = ["| " + " | ".join(head.replace("_", " ") for head in heads) + " |"]
    lines.append("| " + " | ".join("---:" if form else "---" for form in columns.values()) + " |")
    for row in rows:
        cells = (str(cell(row, name, form)) for name, form in columns.items())
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(result: Row) -> str:
    """The tables of a result."""
    sizes = result["sizes"]
    lines = [f"# Ring attention on a GPU, {result['date']}", "", f"{result['machine']}.", ""]
    intros = {
        "right": "Norm error over norm against fp64; the bar is one FA2 call a document (bf16) or "
        f"{FP32_LIMIT} (fp32); a pass is within {ROOM} of it.",
        "dense": f"One causal document, bf16, {sizes['hidden']} channels; TFLOP/s of visible pairs."
        " Ours are one rank's passes, fp32 sums included. Peak: above the inputs.",
        "packed": f"{sizes['packed_length']} tokens, packed, one rank: share of the kernel's own "
        f"rate on one document of that length; a pass is {PACKED_BAR:.0%} of it, both passes.",
        "ring": f"{sizes['packed_length']} tokens; all ranks one after another on one device, no "
        "transfers: one call's time over theirs. Balanced: over the imbalance, as ranks wait for "
        f"the slowest. Peak: of rank 0. A pass is {RING_BARS['dense']:.0%} dense, "
        f"{RING_BARS['short']:.0%} packed, of one call, both passes.",
        "graph": "The same from CUDA graphs: without the host's part of launches.",
    }
    for section in SECTIONS:
        if result["rows"][section]:
            lines += [f"## {section}", "", intros[section], ""]
            lines += [*table(result["rows"][section], COLUMNS[section]), ""]
            judged = [row["pass"] for row in result["rows"][section] if "pass" in row]
            if judged:
                lines += [f"{sum(judged)} of {len(judged)} pass.", ""]
    if result["failed"]:
        lines += ["## Failed", "", *(f"- {what}" for what in result["failed"]), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, then write a dated table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--out", type=Path, help="path without a suffix")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --quick tries the script itself")
    device = torch.device(options.device)
    if device.type == "cpu":
        sizes, machine = DRY, f"{platform.machine()} CPU, a dry run: these figures say nothing"
    else:
        sizes = QUICK if options.quick else Sizes()
        machine = torch.cuda.get_device_name()
    libraries = ", ".join(f"{k} {v}" for k, v in optional_kernels().items() if v)
    bench = Bench(device, sizes)
    result: Row = {
        "date": date.today().isoformat(),
        "machine": f"{machine}; torch {torch.__version__}, {libraries or 'nothing else'}",
        "sizes": vars(sizes),
        "rows": bench.rows,
        "failed": bench.failed,
    }
    default = Path(__file__).parent / "results" / f"ring_gpu-{result['date']}"
    out: Path = options.out or default
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {"right": right, "dense": dense, "packed": packed, "ring": ring, "graph": graph}
    for section in options.sections:
        began = time.perf_counter()
        with bench.caught(section):
            run[section](bench)
        print(f"{section} took {time.perf_counter() - began:.0f} s", flush=True)
        # After each section, so that what is measured is kept.
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    wrong = [row for row in bench.rows["right"] if not row["pass"]]
    if wrong or not bench.kernels:
        raise SystemExit(f"{len(wrong)} checks failed")


if __name__ == "__main__":
    main()
