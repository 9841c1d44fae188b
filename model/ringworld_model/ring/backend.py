"""Which block kernel runs: chosen once, with the reason said aloud; never a silent slow path."""

from __future__ import annotations

from ringworld_model.ring.block_cpu import CpuKernel
from ringworld_model.ring.kernel import RingKernel
from ringworld_model.ring.rectangles import RectangleKernel
from ringworld_model.ring.reference import ReferenceKernel

_KERNELS = {
    "cpu": RectangleKernel(CpuKernel()),
    "reference": RectangleKernel(ReferenceKernel()),
}
_KNOWN = ("auto", "cpu", "flash", "triton", "reference")
_CPU_DTYPES = ("float64", "float32", "bfloat16", "float16")


def choose_backend(
    device_type: str, dtype: str, requested: str = "auto", head_dim: int | None = None
) -> tuple[str, str]:
    """Choose the block kernel for a device and dtype.

    Args:
        device_type: "cpu" or "cuda".
        dtype: torch's name of the dtype of q, k and v: "float32", "bfloat16", ...
        requested: "auto", or the one backend to use.
        head_dim: width of a head; None where it is not known yet.

    Returns:
        (backend, why it was chosen).

    Raises:
        ValueError: the backend is unknown or cannot run here; says what can.
    """
    dtype = dtype.removeprefix("torch.")
    if requested not in _KNOWN:
        raise ValueError(
            f"attention.backend={requested!r} is unknown; choose one of {', '.join(_KNOWN)}"
        )
    if requested == "reference":
        _check_head_dim("reference", head_dim)
        return "reference", "asked for: dense fp64 blocks, slow and exact, for checks only"
    if requested in ("flash", "triton"):
        raise ValueError(
            f"attention.backend={requested!r} is not in this version; use auto or cpu with "
            "resources.accelerator: cpu"
        )
    if device_type != "cpu":
        raise ValueError(
            f"attention.backend={requested!r} has no kernel for device {device_type!r} in this "
            "version; set resources.accelerator: cpu, or attention.backend: reference for a small "
            "check"
        )
    if dtype not in _CPU_DTYPES:
        raise ValueError(
            f"attention.backend={requested!r} takes {', '.join(_CPU_DTYPES)} on cpu, not {dtype}"
        )
    _check_head_dim("cpu", head_dim)
    chosen = "the device is a cpu" if requested == "auto" else "asked for"
    return "cpu", f"{chosen}: torch's flash attention for cpu, {dtype}"


def ring_kernel(backend: str) -> RingKernel:
    """Return the kernel of a backend that ``choose_backend`` returned."""
    return _KERNELS[backend]


def _check_head_dim(backend: str, head_dim: int | None) -> None:
    widths = _KERNELS[backend].head_dims
    if head_dim is not None and head_dim not in widths:
        raise ValueError(
            f"attention.backend={backend!r} takes a head_dim of {widths[0]} to {widths[-1]}, not "
            f"{head_dim}; use more heads"
        )
