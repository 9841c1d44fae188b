"""Our Triton kernels through the real compiler and assembler, for devices that are not here."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KIB = 1024
SHARED = {80: 163 * KIB, 90: 227 * KIB}

# Spilled registers in bytes a thread, at most. Half types on Hopper are what the kernels are for.
VARIANTS = {
    ("attend_forward", "bf16", 128, 90): 0,
    ("attend_backward_keys", "bf16", 128, 90): 480,
    ("attend_backward_queries", "bf16", 128, 90): 0,
    ("attend_backward_keys", "bf16", 64, 90): 48,
    ("attend_forward", "fp32", 64, 90): 0,
    ("attend_forward", "bf16", 128, 80): 32,
    ("sum_delta", "bf16", 128, 80): 0,
}


@functools.cache
def compiled(cache):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_compile.py"), json.dumps(list(VARIANTS))],
        env={
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "PYTHONPATH": str(HERE.parents[2] / "model"),
            "TRITON_CACHE_DIR": cache,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
@pytest.mark.timeout(660)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_kernels_compile_for_the_device(cache, variant):
    kernel, dtype, _, capability = variant
    found = compiled(cache)[str(list(variant))]
    assert 0 < found["cubin"]
    assert found["shared"] <= SHARED[capability]
    assert found["spilled"] <= VARIANTS[variant]
    if capability == 90 and dtype == "bf16":
        assert found["wgmma"] > 0
