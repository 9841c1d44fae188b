"""Which ring kernel runs: chosen once, with the reason said aloud; never a silent slow path.

The backend is chosen first, from what the device, the dtype and the installation allow. Then the
layout is chosen for it: ``plan_rows(..., backend=chosen)`` counts what each layout costs that
backend, ``plan.explain()`` says the outcome.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib import metadata
from typing import NamedTuple

import torch

from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.block_flash import FlashKernel
from ringworld_model.ring.block_triton import TritonKernel
from ringworld_model.ring.flash_ops import choose_op
from ringworld_model.ring.kernel import RingKernel
from ringworld_model.ring.rectangles import RectangleKernel
from ringworld_model.ring.reference import ReferenceKernel
from ringworld_model.ring.triton_launch import triton_missing

_KERNELS: dict[str, RingKernel] = {
    "cpu": RectangleKernel(CpuKernel()),
    "flash": FlashKernel(),
    "triton": TritonKernel(),
    "reference": RectangleKernel(ReferenceKernel()),
}
_DTYPES = {
    "cpu": ("float64", "float32", "bfloat16", "float16"),
    "reference": ("float64", "float32", "bfloat16", "float16"),
    "flash": ("bfloat16", "float16"),
    "triton": ("bfloat16", "float16", "float32"),
}
_WORDS = {
    "cpu": "torch's flash attention for cpu",
    "reference": "dense fp64 blocks, slow and exact, for checks only",
    "flash": "variable-length flash attention calls",
    "triton": "our Triton kernels, one launch a ring step for any layout",
}
_OPTIONAL = {
    "triton": "triton",
    "flash-attn-4": "flash_attn.cute",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn": "flash_attn_2_cuda",
}


class Machine(NamedTuple):
    """What can run on the device, as far as the choice asks.

    Attributes:
        cuda_missing: why there is no CUDA device; None where there is one.
        triton_missing: why our Triton kernels cannot run; None where they can.
    """

    cuda_missing: str | None
    triton_missing: str | None


def choose_backend(
    device_type: str,
    dtype: str,
    requested: str = "auto",
    head_dim: int | None = None,
    *,
    machine: Machine | None = None,
) -> tuple[str, str]:
    """Choose the backend for a device, a dtype and a head width.

    "auto" takes ``cpu`` on a CPU. On a CUDA device it takes ``triton``, which serves every layout
    in one launch a step, and ``flash`` where that cannot run.

    Args:
        device_type: "cpu" or "cuda".
        dtype: torch's name of the dtype of q, k and v: "float32", "bfloat16", ...
        requested: "auto", or the one backend to use.
        head_dim: width of a head; None where it is not known yet.
        machine: what can run; None: look.

    Returns:
        (backend, why it was chosen).

    Raises:
        ValueError: the backend is unknown or cannot run here; says why, and the remedy.
    """
    dtype = dtype.removeprefix("torch.")
    if requested not in ("auto", *_KERNELS):
        raise ValueError(
            f"attention.backend={requested!r} is unknown; choose one of auto, {', '.join(_KERNELS)}"
        )
    problems: list[str] = []
    candidates = ("triton", "flash") if device_type == "cuda" else ("cpu",)
    for backend in candidates if requested == "auto" else (requested,):
        problem = _cannot_run(backend, device_type, machine) or _unserved(backend, dtype, head_dim)
        if problem is None:
            by = f"the device is a {device_type}" if requested == "auto" else "asked for"
            instead = [f"not {what}" for what in problems]
            return backend, "; ".join((f"{by}: {_WORDS[backend]}, {dtype}", *instead))
        problems.append(f"{backend} {problem}")
    raise ValueError(f"attention.backend={requested!r} cannot run: {'; '.join(problems)}")


def ring_kernel(backend: str) -> RingKernel:
    """Return the kernel of a backend that ``choose_backend`` returned."""
    return _KERNELS[backend]


def explain_kernel(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Say what a backend runs; of ``flash``, the library whose op was proved on the device.

    Raises:
        ValueError: no flash op runs on the device; says why not, op by op.
    """
    return choose_op(device, dtype, head_dim).why if backend == "flash" else _WORDS[backend]


def optional_kernels() -> dict[str, str | None]:
    """Return the version of each optional kernel library; None where it cannot be imported."""
    return {name: _version(name, module) for name, module in _OPTIONAL.items()}


def _version(name: str, module: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"
    # To find a part of a package, Python imports the package, which may be broken.
    except Exception:
        return None


def _cannot_run(backend: str, device_type: str, machine: Machine | None) -> str | None:
    """Why a backend cannot run on a kind of device, with the remedy; None where it can."""
    if backend == "reference":
        return None
    if device_type not in ("cpu", "cuda"):
        return (
            f"has no kernel for device {device_type!r}; set resources.accelerator: cpu, or "
            "attention.backend: reference for a small check"
        )
    if device_type == "cpu":
        if backend == "cpu":
            return None
        missing = machine.triton_missing if machine else _triton_missing("cpu")
        if backend == "triton" and missing is None:
            return None
        return "needs a CUDA device; use auto or cpu with resources.accelerator: cpu"
    if backend == "cpu":
        return (
            "has no kernel for device 'cuda'; use attention.backend: auto, or "
            "resources.accelerator: cpu"
        )
    missing = machine.cuda_missing if machine else _cuda_missing()
    if missing:
        return f"needs a CUDA device, but {missing}; set resources.accelerator: cpu"
    missing = machine.triton_missing if machine else _triton_missing("cuda")
    if backend == "triton" and missing:
        return f"cannot run, {missing}; install triton, or use flash in bf16 or fp16"
    return None


def _unserved(backend: str, dtype: str, head_dim: int | None) -> str | None:
    """Why a backend does not serve a dtype or width, with the remedy; None where it does."""
    if dtype not in _DTYPES[backend]:
        return f"takes {', '.join(_DTYPES[backend])}, not {dtype}; use one of them"
    if head_dim is not None and head_dim not in _KERNELS[backend].head_dims:
        widths = _KERNELS[backend].head_dims
        steps = f" in steps of {widths.step}" if widths.step > 1 else ""
        return (
            f"takes a head_dim of {widths[0]} to {widths[-1]}{steps}, not {head_dim}; "
            f"use {'more' if head_dim > widths[-1] else 'other'} heads"
        )
    return None


@cache
def _cuda_missing() -> str | None:
    return None if torch.cuda.is_available() else "torch sees none"


@cache
def _triton_missing(device_type: str) -> str | None:
    return triton_missing(torch.device(device_type))
