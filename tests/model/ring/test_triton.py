"""Our Triton kernels under Triton's interpreter, in a process of their own."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ringworld_model.ring.block_triton import TritonKernel
from ringworld_model.ring.kernel import group_rows
from ringworld_model.ring.plan import plan_ring
from ringworld_model.ring.triton_launch import triton_missing

HERE = Path(__file__).parent


@functools.cache
def results():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "triton_cases.py")],
        env={
            **os.environ,
            "PYTHONPATH": str(HERE.parents[2] / "model"),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "case",
    [
        "one document",
        "packed, 127 to 129",
        "zigzag, short",
        "striped, short",
        "zigzag of each document",
        "contiguous, 4 queries a key",
        "block-cyclic, 7 queries a key",
        "head_dim 128",
        "head_dim 40",
        "two rows",
        "no document",
        "scale below 0",
    ],
)
def test_fp32_matches_the_oracle(case):
    for name, error in results()[case].items():
        assert error <= 5e-6, f"{name}: {error:.2e}"


def test_half_types_over_a_ring_are_no_worse_than_in_one_call():
    alone = results()["bfloat16, one call"]
    for name, error in results()["bfloat16"].items():
        # dV is a sum in fp32 either way, rounded once: equal but for the order of the sum.
        assert error <= alone[name] * 1.01, f"{name}: {error:.2e}"
        # fp16 keeps three bits more.
        assert results()["float16"][name] <= alone[name] / 4


@pytest.mark.parametrize(
    "case",
    [
        "document 0 is NaN, zigzag",
        "document 1 is NaN, block_cyclic",
        "document 3 is NaN, striped",
    ],
)
def test_a_document_of_nan_changes_no_bit_of_another(case):
    assert results()[case] == {"out": 0, "dq": 0, "dk": 0, "dv": 0}


def test_padding_sees_nothing():
    assert results()["padding"] == {"padding": 0, "tokens": 0}


def test_the_kernels_say_why_they_cannot_run():
    assert triton_missing(torch.device("cpu")) in ("the device is a cpu", "triton is not installed")
    assert "mps" in (triton_missing(torch.device("mps")) or "")


@pytest.mark.parametrize(
    ("shape", "dtype", "problem"),
    [
        ((1, 8, 1, 32), torch.float64, "float64"),
        ((1, 8, 1, 160), torch.float32, "head_dim of 1 to 128, not 160"),
        ((1, 9, 1, 32), torch.float32, "9 tokens a row; its plans, 8"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(shape, dtype, problem):
    rows = group_rows([plan_ring([8], 8, 1)])
    with pytest.raises(ValueError, match=problem):
        TritonKernel().forward(0, rows, torch.zeros(shape, dtype=dtype), 1.0)
