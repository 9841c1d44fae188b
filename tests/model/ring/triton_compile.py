"""Compiles kernels as they are launched on a device that is not here; run by its test.

Prints one JSON object, {variant: what the compiler made of it}.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringworld_model.ring import triton_backward_keys, triton_backward_queries, triton_forward
from ringworld_model.ring.triton_launch import Launch, block_width, launches

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INPUTS = ("grad_out", "q", "k", "v")
TABLES = ("visits", "masked", "ranges")
SUMS = ("lse", "delta", "dk", "dv", "dq")


def launch_of(kernel, width, dtype, capability):
    forward, keys, queries = launches(width, DTYPES[dtype], divmod(capability, 10))
    return {
        "attend_forward": forward,
        "attend_backward_keys": keys,
        "attend_backward_queries": queries,
        "sum_delta": Launch(64, 64, 4, 2),
    }[kernel]


def source(kernel, dtype, width, launch):
    """What a launch with aligned tensors of a later ring step asks the compiler for."""
    modules = (triton_forward, triton_backward_keys, triton_backward_queries)
    function = next(getattr(one, kernel) for one in modules if hasattr(one, kernel))
    constants = {
        "D": width,
        "BLOCK_D": block_width(width),
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.tile_k,
        "TILE": 64,
        "FIRST": False,
        "NEGATE": False,
        "UPCAST": False,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
    }
    types, values, attributes = {}, {}, {}
    for at, name in enumerate(function.arg_names):
        if name in constants:
            types[name], values[(at,)] = "constexpr", constants[name]
            continue
        if name == "out":
            types[name] = f"*{dtype}" if kernel == "sum_delta" else "*fp32"
        elif name in INPUTS:
            types[name] = f"*{dtype}"
        elif name in SUMS:
            types[name] = "*fp32"
        elif name in TABLES:
            types[name] = "*i32"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
        param = function.params[at]
        skips = param.do_not_specialize or param.do_not_specialize_on_alignment
        if name != "scale" and not skips:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(function, types, values, attributes)


def spilled(ptx, capability):
    """Bytes a thread that the assembler stores because registers ran out."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        target = f"sm_{capability}{'a' if capability >= 90 else ''}"
        done = subprocess.run(
            [assembler, "-v", "--gpu-name", target, "kernel.ptx", "-o", "kernel.cubin"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    return max(int(size) for size in re.findall(r"(\d+) bytes spill stores", done.stderr))


def build(variant):
    kernel, dtype, width, capability = variant
    launch = launch_of(kernel, width, dtype, capability)
    built = triton.compile(
        source(kernel, dtype, width, launch),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    return {
        "shared": built.metadata.shared,
        "cubin": len(built.asm["cubin"]),
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
        "spilled": spilled(built.asm["ptx"], capability),
    }


def main():
    variants = json.loads(sys.argv[1])
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(build, variants))
    json.dump({str(key): found for key, found in zip(variants, results, strict=True)}, sys.stdout)


if __name__ == "__main__":
    main()
