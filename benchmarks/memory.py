"""Peak memory and time of one training step, lever by lever, and the longest context that fits.

Each lever is added to those above it. On CUDA the peak is the allocator's; on a CPU it is the most
bytes of tensors that live at one time, those that a GPU run would keep in host memory not counted
(weights, gradients, optimizer state and activations are; what a kernel needs inside itself is not).
Seconds are wall time on CUDA, and this process's CPU time on a CPU, which others may be using too.

    python benchmarks/memory.py                                  # a small model on a CPU
    python benchmarks/memory.py --preset llama3.2-1b --device cuda --dtype bfloat16 \
        --lengths 16384 32768 65536 131072 --device-memory 75GiB

With `--ranks 2` a row goes round a ring, and figures are the first rank's. `--deepspeed` adds rows
under ZeRO-3 (the whole project must be installed); without it, model/ on PYTHONPATH is enough.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from memory_report import write

from ringworld_model.batch import TrainBatch, cut
from ringworld_model.config import PRESETS, ModelConfig, preset
from ringworld_model.live_tensors import LiveTensors
from ringworld_model.loss import combine
from ringworld_model.packing import pack_row
from ringworld_model.ring import RingContext, plan_rows
from ringworld_model.tokens import text_example
from ringworld_model.transformer import WorldModel, init_weights


@dataclass(frozen=True)
class Levers:
    """What is switched on."""

    name: str
    loss_tile: bool = False
    checkpointing: str = "none"
    mlp_tile: bool = False
    offload: bool = False
    host_optimizer: bool = False
    host_parameters: bool = False
    deepspeed: bool = False


PLAIN = Levers("none")
LOSS = replace(PLAIN, name="tiled loss", loss_tile=True)
SAVED = replace(LOSS, name="+ checkpointing: attention_saved", checkpointing="attention_saved")
FULL = replace(LOSS, name="+ checkpointing: full", checkpointing="full")
TILED = replace(FULL, name="+ tiled MLP", mlp_tile=True)
OFFLOAD = replace(TILED, name="+ activation offload", offload=True)
HOST = replace(OFFLOAD, name="+ optimizer offload", host_optimizer=True)
SAVED_HOST = replace(
    HOST, name="the same, attention_saved instead of full", checkpointing="attention_saved"
)
LADDER = [PLAIN, LOSS, SAVED, FULL, TILED, OFFLOAD, HOST, SAVED_HOST]
ZERO = replace(OFFLOAD, name="ZeRO-3, as activation offload above", deepspeed=True)
ZERO_HOST = replace(ZERO, name="ZeRO-3 + optimizer offload", host_optimizer=True)
ZERO_ALL = replace(ZERO_HOST, name="ZeRO-3 + parameter offload", host_parameters=True)
DEEPSPEED = [ZERO, ZERO_HOST, ZERO_ALL]


class Adam:
    """AdamW over fp32 masters, one parameter at a time; the masters may be in host memory."""

    def __init__(self, model: torch.nn.Module, on_host: bool) -> None:
        """Copy the masters, unless the weights themselves can be they."""
        self.pairs: list[tuple[torch.Tensor, torch.Tensor, torch.optim.Optimizer]] = []
        for parameter in model.parameters():
            master: torch.Tensor = parameter
            if on_host or parameter.dtype != torch.float32:
                where = torch.device("cpu") if on_host else parameter.device
                master = torch.empty(
                    parameter.shape, device=where, pin_memory=on_host and parameter.is_cuda
                )
                master.copy_(parameter.detach())
            optimizer = torch.optim.AdamW([master], lr=1e-5, fused=True)
            self.pairs.append((parameter, master, optimizer))
        largest = max(master.numel() for _, master, _ in self.pairs)
        pinned = on_host and next(model.parameters()).is_cuda
        self.landing = torch.empty(largest, pin_memory=True) if pinned else None

    @torch.no_grad()
    def step(self) -> None:
        """Update, and drop the gradients."""
        for parameter, master, optimizer in self.pairs:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if self.landing is None:
                master.grad = gradient.float()
            else:
                master.grad = self.landing[: master.numel()].view_as(master)
                master.grad.copy_(gradient)
            optimizer.step()
            master.grad = None
            if master is not parameter:
                parameter.copy_(master, non_blocking=True)

    def tensors(self) -> list[torch.Tensor]:
        """Masters and moments."""
        states = (state for *_, optimizer in self.pairs for state in optimizer.state.values())
        moments = [value for state in states for value in state.values()]
        return [master for _, master, _ in self.pairs] + moments


class Trainer:
    """One model and its optimizer, on one rank."""

    def __init__(self, levers: Levers, options: argparse.Namespace, rank: int) -> None:
        """Build them; a collective."""
        self.levers, self.options, self.rank = levers, options, rank
        self.device = torch.device("cpu" if on_cpu(options) else f"cuda:{rank}")
        self.group = dist.group.WORLD if options.ranks > 1 else None
        torch.manual_seed(0)
        self.model = WorldModel(
            shape(options),
            rope_theta=1e6,
            activation_checkpointing=levers.checkpointing,
            activation_offload=levers.offload,
            mlp_tile_tokens=options.mlp_tile if levers.mlp_tile else None,
            loss_tile_tokens=options.loss_tile if levers.loss_tile else 1 << 40,
        )
        init_weights(self.model, 0)
        self.adam: Adam | None = None
        self.engine: Any = None
        if levers.deepspeed:
            self.engine = deepspeed_engine(self.model, levers, options)
            self.model = self.engine.module
        else:
            self.model.to(self.device, getattr(torch, options.dtype))
            self.adam = Adam(self.model, levers.host_optimizer)

    def step(self, length: int) -> None:
        """One optimizer step on a row of ``length`` tokens of one document."""
        whole, plans = row_of(length, self.options)
        local = cut(whole, plans, self.rank).to(self.device) if self.options.ranks > 1 else whole
        ring = RingContext(plans=plans, group=self.group)
        weight = torch.tensor([length - 1.0, 0.0], dtype=torch.float64)
        sums = (self.engine or self.model)(local.to(self.device), ring)
        if self.engine is not None:
            self.engine.backward(combine(sums, weight, (1.0, 0.0), self.engine.loss_factor))
            self.engine.step()
        elif self.adam is not None:
            combine(sums, weight, (1.0, 0.0)).backward()
            self.adam.step()

    def measure(self, length: int, repetitions: int) -> dict[str, Any]:
        """Peak bytes and the median seconds of a step."""
        self.step(length)  # optimizer state, host memory and kernels are made here
        figures: dict[str, Any] = {"peak": self.peak(length)}
        if pool := self.model.offload and self.model.offload.pool:
            figures["host_activations"] = pool.held_bytes
        times = []
        for _ in range(repetitions):
            began = self.clock()
            self.step(length)
            times.append(self.clock() - began)
        return figures | {"seconds": statistics.median(times)}

    def peak(self, length: int) -> float | None:
        """The most bytes on the device during one step; None where that does not show."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step(length)
            return float(torch.cuda.max_memory_allocated(self.device))
        if self.adam is None:
            return None  # which of DeepSpeed's tensors a GPU would hold
        states, on_host = self.adam.tensors(), self.levers.host_optimizer
        host = {tensor.untyped_storage().data_ptr() for tensor in states} if on_host else set()

        def elsewhere(address: int) -> bool:
            pool = self.model.offload.pool if self.model.offload else None
            return address in host or (pool is not None and pool.holds(address))

        gc.collect()
        with LiveTensors(elsewhere) as live:
            for tensor in [*self.model.parameters(), *states]:
                live.count(tensor)
            self.step(length)
        return float(live.peak_bytes)

    def clock(self) -> float:
        """Seconds: of a GPU's work by the wall, of a CPU's by what this process used of it."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def shape(options: argparse.Namespace) -> ModelConfig:
    """The preset, text only."""
    return preset(options.preset, num_layers=options.layers, vision_codebook_size=0)


def row_of(length: int, options: argparse.Namespace) -> tuple[TrainBatch, list[Any]]:
    """A whole row and its plan."""
    ids = np.random.default_rng(0).integers(0, shape(options).text_vocab_size, length)
    batch = pack_row([text_example(ids)], length, "token")
    return batch, plan_rows(batch.document_lengths, length, options.ranks)


def deepspeed_engine(model: WorldModel, levers: Levers, options: argparse.Namespace) -> Any:
    """The real engine, under ZeRO-3."""
    from ringworld_jobs.spec import MemorySpec, OptimizerSpec, StageSpec
    from ringworld_workers.engine.build import build_engine
    from ringworld_workers.mesh import build_mesh

    stage = StageSpec.model_validate(
        {
            "name": "memory",
            "context_length": "1Ki",
            "rope_theta": 1e6,
            "steps": 1,
            "global_batch_tokens": 1024,
            "mixture": {"a": 1},
            "learning_rate": {"peak": 1e-5},
            "zero_stage": 3,
            "precision": "bf16" if options.dtype == "bfloat16" else "fp32",
            "memory": MemorySpec(
                optimizer_offload=levers.host_optimizer, parameter_offload=levers.host_parameters
            ),
        }
    )
    return build_engine("deepspeed", model, OptimizerSpec(), stage, build_mesh(options.ranks, 1))


def longest(trainer: Trainer, options: argparse.Namespace) -> dict[str, Any]:
    """The longest row within the budget, to 1/16; and the time of its step.

    On CUDA a row fits if the allocator, held to the budget, serves it. A row whose step would
    take longer than the limit is not tried: ``limited`` says so.
    """
    unit = 1024 if trainer.device.type == "cuda" else 256
    seconds = 0.0

    def fits(length: int) -> bool:
        nonlocal seconds
        try:
            began = trainer.clock()
            used = trainer.peak(length)
            taken = trainer.clock() - began
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            return False
        if used is not None and used <= options.device_memory:
            seconds = taken
            return True
        return False

    trainer.step(unit)
    low, high = 0, unit
    while fits(high):
        low, high = high, 2 * high
        if 4 * seconds > options.seconds:  # attention grows with the square
            return {"longest": low, "seconds": seconds, "limited": True}
    while high - low > max(unit, low // 16):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"longest": low, "seconds": seconds, "limited": False}


def run_rank(rank: int, store: str, levers: Levers, options: argparse.Namespace) -> None:
    """All lengths with these levers; the first rank writes what it measured."""
    os.environ.setdefault("LOCAL_RANK", str(rank))
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.cuda.set_device(rank)
        whole = torch.cuda.get_device_properties(rank).total_memory
        if options.device_memory:
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.device_memory / whole))
    grouped = options.ranks > 1 or levers.deepspeed
    if grouped:
        dist.init_process_group(
            "nccl" if options.device == "cuda" else "gloo",
            store=dist.FileStore(store, options.ranks),
            rank=rank,
            world_size=options.ranks,
            timeout=timedelta(minutes=30),
        )
    trainer = Trainer(levers, options, rank)
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        row: dict[str, Any] = {"levers": levers.name, "tokens": length}
        try:
            row |= trainer.measure(length, options.repetitions)
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)
    found = None
    if options.device_memory and options.ranks == 1 and not (levers.deepspeed and on_cpu(options)):
        found = {"levers": levers.name, **longest(trainer, options)}
        print(json.dumps(found), flush=True)
    if rank == 0:
        Path(store + ".json").write_text(json.dumps({"rows": rows, "longest": found}))
    if grouped:
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()


def on_cpu(options: argparse.Namespace) -> bool:
    """Whether the levers' effect is counted, not measured."""
    return bool(options.device == "cpu")


def in_processes(levers: Levers, options: argparse.Namespace) -> dict[str, Any]:
    """Fresh processes for each combination: nothing that another left can show."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        ranks = [
            context.Process(target=run_rank, args=(rank, store, levers, options))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"{levers.name}: a rank ended with an error, see above")
        return dict(json.loads(Path(store + ".json").read_text()))


def size(text: str) -> int:
    """Bytes of ``64MiB`` or ``80GiB``."""
    for suffix, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * factor)
    raise argparse.ArgumentTypeError(f"{text!r}: write a number with MiB or GiB, such as 80GiB")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--layers", type=int, help="layers in place of the preset's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--device-memory", type=size, default=0, help="search the longest context")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest step of that search")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--loss-tile", type=int, default=2048)
    parser.add_argument("--mlp-tile", type=int, default=4096)
    parser.add_argument("--levers", nargs="*", help="only the combinations whose name holds a word")
    parser.add_argument("--deepspeed", action="store_true", help="add rows under ZeRO-3")
    parser.add_argument("--out", type=Path, help="path without a suffix")
    return parser.parse_args()


def main() -> None:
    """Measure, then write dated tables and a picture."""
    options = parse()
    chosen = LADDER + (DEEPSPEED if options.deepspeed else [])
    if options.levers:
        chosen = [one for one in chosen if any(word in one.name for word in options.levers)]
    load = os.getloadavg()[0]
    results = [in_processes(levers, options) for levers in chosen]
    config = shape(options)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    result = {
        "date": date.today().isoformat(),
        "machine": f"{machine}, torch {torch.__version__}",
        "load": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "model": asdict(config),
        "parameters": config.num_parameters(),
        "rows": [row for one in results for row in one["rows"]],
        "longest": [one["longest"] for one in results if one["longest"]],
    }
    name = f"memory-{options.preset}-{options.device}-{result['date']}"
    write(options.out or Path(__file__).parent / "results" / name, result)


if __name__ == "__main__":
    main()
