"""Which backend is chosen, and what is said where none can run."""

import pytest
import torch

from ringworld_model.ring.backend import (
    Machine,
    choose_backend,
    explain_kernel,
    optional_kernels,
    ring_kernel,
)

GPU = Machine(cuda_missing=None, triton_missing=None)
NO_TRITON = Machine(cuda_missing=None, triton_missing="triton is not installed")
NO_GPU = Machine(cuda_missing="torch sees none", triton_missing="the device is a cpu")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "torch.float32"])
def test_auto_takes_the_cpu_kernel_on_cpu(dtype):
    backend, reason = choose_backend("cpu", dtype)
    assert backend == "cpu"
    assert "cpu" in reason and dtype.removeprefix("torch.") in reason


@pytest.mark.parametrize(
    ("dtype", "head_dim", "machine", "backend", "reason"),
    [
        ("bfloat16", 128, GPU, "triton", "the device is a cuda: our Triton kernels"),
        ("float32", 64, GPU, "triton", "float32"),
        ("bfloat16", None, GPU, "triton", ""),
        ("bfloat16", 128, NO_TRITON, "flash", "not triton cannot run, triton is not installed"),
    ],
)
def test_auto_on_a_gpu_takes_triton_and_else_flash(dtype, head_dim, machine, backend, reason):
    got = choose_backend("cuda", dtype, "auto", head_dim, machine=machine)
    assert got[0] == backend
    assert reason in got[1]


@pytest.mark.parametrize("requested", ["flash", "triton", "reference"])
def test_what_is_asked_for_is_taken(requested):
    backend, reason = choose_backend("cuda", "bfloat16", requested, 64, machine=GPU)
    assert backend == requested
    assert reason.startswith("asked for")
    assert 64 in ring_kernel(backend).head_dims


def test_reference_runs_anywhere_when_asked_for():
    assert choose_backend("cuda", "bfloat16", "reference", machine=NO_GPU)[0] == "reference"


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "head_dim", "machine", "message"),
    [
        ("cuda", "bfloat16", "auto", 64, NO_GPU, "torch sees none; set resources.accelerator: cpu"),
        ("cuda", "bfloat16", "cpu", 64, GPU, "no kernel for device 'cuda'; use .*auto"),
        ("cuda", "float32", "auto", 64, NO_TRITON, "install triton.*flash takes bfloat16.*float32"),
        ("cuda", "float32", "flash", 64, GPU, "flash takes bfloat16, float16, not float32; use"),
        ("cuda", "bfloat16", "flash", 12, GPU, "8 to 256 in steps of 8, not 12; use other heads"),
        ("cuda", "bfloat16", "auto", 512, GPU, "1 to 128, not 512; use more heads"),
        (
            "cuda",
            "bfloat16",
            "triton",
            64,
            NO_TRITON,
            "not installed; install triton, or use flash",
        ),
        ("cpu", "float32", "triton", 64, NO_GPU, "needs a CUDA device; use auto or cpu"),
        ("cpu", "bfloat16", "flash", 64, NO_GPU, "needs a CUDA device; use auto or cpu"),
        ("cpu", "float32", "fast", 64, NO_GPU, " is unknown; choose one of auto, cpu"),
        ("cpu", "int64", "auto", 64, NO_GPU, "takes float64.*not int64"),
        ("mps", "float32", "auto", 64, NO_GPU, "no kernel for device 'mps'.*accelerator: cpu"),
    ],
)
def test_impossible_backends_are_refused_with_a_remedy(
    device, dtype, requested, head_dim, machine, message
):
    with pytest.raises(ValueError, match=f"attention.backend='{requested}'.*{message}"):
        choose_backend(device, dtype, requested, head_dim, machine=machine)


def test_without_a_gpu_a_cuda_job_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        choose_backend("cuda", "bfloat16")


def test_the_op_behind_a_backend_is_explained():
    assert "one launch" in explain_kernel("triton", torch.device("cpu"), torch.bfloat16, 64)
    with pytest.raises(ValueError, match="no op for"):
        explain_kernel("flash", torch.device("cpu"), torch.bfloat16, 64)


def test_optional_kernels_are_listed_with_their_versions():
    found = optional_kernels()
    assert list(found) == ["triton", "flash-attn-4", "flash-attn-3", "flash-attn"]
    for version in found.values():
        assert version is None or version[0].isdigit() or version == "of unknown version"
