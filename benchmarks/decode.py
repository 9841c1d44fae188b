"""Prefill and decode against the length of the context: ours on rings, and transformers' generate.

The same weights (ours, written by ``save_pretrained``), the same prompt, greedy; every method must
write the same tokens. Each method and length runs in fresh processes. Prefill is the time to the
first token; a token's time is the median between tokens; memory is the peak above the weights, and
what a rank keeps of keys and values.

    python benchmarks/decode.py                                     # 1Ki to 64Ki, minutes
    python benchmarks/decode.py --lengths 1024 4096 --new-tokens 8  # a minute

On GPUs, a 1Mi prompt for a model of a billion parameters, on as many of them as a ring has ranks:
    python benchmarks/decode.py --device cuda --preset llama3.2-1b --dtype bfloat16 --rings 1 \\
        --chunk 32768 --lengths 131072 1048576
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringworld_model.config import PRESETS, preset, preset_rope_theta
from ringworld_model.hf import from_pretrained, save_pretrained
from ringworld_model.transformer import WorldModel, init_weights

OURS, PEER = "ours, ring of", "transformers, threads:"


def prompt_of(length: int, vocabulary: int) -> torch.Tensor:
    """The same ids for every method: int64 [length]."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocabulary, (length,), generator=generator)


class Clock:
    """Wall and CPU seconds at each token, and the peak of memory."""

    def __init__(self, device: str) -> None:
        """Begin, with what is in memory now as the base."""
        self._device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._base = status("VmRSS")
        self.wall = [time.perf_counter()]
        self.cpu = [time.process_time()]

    def tick(self) -> None:
        """A token has come."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def figures(self) -> dict[str, float]:
        """Seconds of the prefill, medians of a token, and peak bytes above the base."""
        peak = status("VmHWM") if self._device == "cpu" else torch.cuda.max_memory_allocated()
        found: dict[str, float] = {"peak_bytes": peak - self._base}
        for name, times in (("wall", self.wall), ("cpu", self.cpu)):
            gaps = [late - early for early, late in zip(times[1:], times[2:], strict=False)]
            found[f"prefill_{name}_seconds"] = times[1] - times[0]
            found[f"token_{name}_seconds"] = statistics.median(gaps)
        return found


def status(field: str) -> int:
    """Bytes of a field of this process's status, such as VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def ours(options: argparse.Namespace, folder: str, length: int, group: Any) -> dict[str, Any]:
    """``generate`` on this rank of a ring."""
    from ringworld_model.decode import DecodeSession
    from ringworld_model.generate import generate
    from ringworld_model.sampling import DrawSettings, SamplingSettings
    from ringworld_model.sampling.prompt import Prompt
    from ringworld_model.tokens import Span

    model = from_pretrained(folder, dtype=getattr(torch, options.dtype), device=options.device)
    ids = prompt_of(length, model.config.text_vocab_size)
    most = length + options.new_tokens
    asked = SamplingSettings(text=DrawSettings(temperature=0), max_new_tokens=options.new_tokens)
    session = DecodeSession(model, group, max_length=most, chunk=options.chunk)
    clock, kept, tokens = Clock(options.device), 0, []
    for event in generate(session, [Prompt.of(Span(ids.numpy(), 0))], asked):
        clock.tick()
        tokens.append(event.token)
        kept = max(kept, session.held_bytes)
    sent = session.stats.bytes_sent
    return clock.figures() | {"tokens": tokens, "cache_bytes": kept, "sent_bytes": sent}


def transformers_generate(options: argparse.Namespace, folder: str, length: int) -> dict[str, Any]:
    """transformers' own, in this process."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    ids = prompt_of(length, model.config.vocab_size)[None].to(options.device)
    clock = Clock(options.device)

    class Ticks(StoppingCriteria):  # type: ignore[misc]
        """Asked after each token."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            clock.tick()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.new_tokens,
        min_new_tokens=options.new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Ticks()]),
    )
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    kept = token * found.shape[1] * getattr(torch, options.dtype).itemsize
    return clock.figures() | {
        "tokens": found[0, length:].tolist(),
        "cache_bytes": kept,
        "sent_bytes": 0,
    }


def run_rank(
    rank: int, size: int, threads: int, peer: bool, length: int, folder: str, options: Any
) -> None:
    """One method and length on one rank; it writes what it measured."""
    torch.set_num_threads(threads)
    group = None
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    if size > 1:
        dist.init_process_group(
            "nccl" if options.device == "cuda" else "gloo",
            store=dist.FileStore(f"{folder}/store-{size}-{length}", size),
            rank=rank,
            world_size=size,
            timeout=timedelta(minutes=60),
        )
        group = dist.group.WORLD
    if peer:
        found = transformers_generate(options, folder, length)
    else:
        found = ours(options, folder, length, group)
    Path(f"{folder}/found-{rank}.json").write_text(json.dumps(found))
    if group is not None:
        dist.barrier()
        dist.destroy_process_group()


def in_processes(
    method: str, length: int, folder: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one method at one length: the slowest rank's wall time, all ranks' CPU time."""
    peer, number = method.startswith(PEER), int(method.split()[-1])
    size, threads = (1, number) if peer else (number, options.threads)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, size, threads, peer, length, folder, options))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"{method}, {length} tokens: a rank ended with an error, see above")
    found = [json.loads(Path(f"{folder}/found-{rank}.json").read_text()) for rank in range(size)]
    whole: dict[str, Any] = {"method": method, "length": length, "tokens": found[0]["tokens"]}
    for name in found[0].keys() - {"tokens"}:
        whole[name] = (sum if "cpu" in name else max)(each[name] for each in found)
    shown = {key: value for key, value in whole.items() if key != "tokens"}
    print(json.dumps(shown), flush=True)
    return whole


def build(folder: str, options: argparse.Namespace) -> WorldModel:
    """A text model of the preset with drawn weights, written for every method to load."""
    changes: dict[str, Any] = {"vision_codebook_size": 0}
    if options.preset == "tiny":
        changes |= {"num_heads": 4, "num_kv_heads": 2}
    config = preset(options.preset, **changes)
    # Angles of far positions stay apart.
    theta = max(preset_rope_theta(options.preset), 5e6)
    model = WorldModel(config, rope_theta=theta)
    init_weights(model, 0)
    model = model.to(getattr(torch, options.dtype))
    context = max(options.lengths) + options.new_tokens
    save_pretrained(model, f"{folder}/model", context_length=context)
    return model


def write(result: dict[str, Any], out: Path) -> None:
    """Tables, and the figures behind them."""
    rows = result["rows"]
    lengths = sorted({row["length"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["length"]): row for row in rows}
    tables: list[tuple[str, str, float]] = [
        ("Prefill, wall seconds to the first token (CPU seconds of all ranks)", "prefill", 1.0),
        ("One token, wall ms, median (CPU ms of all ranks)", "token", 1e3),
    ]
    head = "| tokens | " + " | ".join(methods) + " |\n| ---: |" + " ---: |" * len(methods)
    lines = [
        f"# Decode, {result['date']}",
        f"{result['machine']}. Load average before and after: {result['load']}.",
        f"Preset {result['options']['preset']}, text only: {result['parameters']:,} parameters, "
        f"{result['heads']} query heads and {result['kv_heads']} key heads of {result['width']}, "
        f"{result['layers']} layers, {result['options']['dtype']}; passes of "
        f"{result['options']['chunk']:,} tokens; {result['options']['new_tokens']} new tokens, "
        "greedy. "
        + (
            "All methods wrote the same tokens."
            if result["same_tokens"]
            else "Not all methods wrote the same tokens: see the JSON."
        ),
    ]
    for title, name, factor in tables:
        body = [
            f"| {length:,} | "
            + " | ".join(
                f"{found[method, length][f'{name}_wall_seconds'] * factor:.2f} "
                f"({found[method, length][f'{name}_cpu_seconds'] * factor:.2f})"
                for method in methods
            )
            + " |"
            for length in lengths
        ]
        lines.append("\n".join([f"{title}:", "", head, *body]))
    body = [
        f"| {length:,} | "
        + " | ".join(
            f"{found[method, length]['peak_bytes'] / 2**20:.0f} "
            f"({found[method, length]['cache_bytes'] / 2**20:.1f})"
            for method in methods
        )
        + " |"
        for length in lengths
    ]
    title = "Memory of a rank, MiB: peak above the weights (keys and values kept)"
    lines.append("\n".join([f"{title}:", "", head, *body]))
    out.with_suffix(".md").write_text("\n\n".join(lines) + "\n")
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out.with_suffix('.md')}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--rings", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each of our ranks")
    parser.add_argument(
        "--peer-threads", type=int, nargs="*", default=[1, 2], help="none leaves transformers out"
    )
    parser.add_argument("--out", type=Path, help="path without a suffix")
    return parser.parse_args()


def main() -> None:
    """Measure, then write dated tables."""
    options = parse()
    load = os.getloadavg()[0]
    methods = [f"{OURS} {size}" for size in options.rings]
    methods += [f"{PEER} {threads}" for threads in options.peer_threads]
    with tempfile.TemporaryDirectory() as folder:
        model = build(folder, options)
        rows = [
            in_processes(method, length, f"{folder}/model", options)
            for length in options.lengths
            for method in methods
        ]
    config = model.config
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    same = {
        length: {tuple(r["tokens"]) for r in rows if r["length"] == length}
        for length in options.lengths
    }
    result = {
        "date": date.today().isoformat(),
        "machine": f"{machine}, torch {torch.__version__}",
        "load": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "parameters": config.num_parameters(),
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "width": config.head_dim,
        "layers": config.num_layers,
        "same_tokens": all(len(each) == 1 for each in same.values()),
        "rows": rows,
    }
    name = f"decode-{result['date']}"
    write(result, options.out or Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    main()
