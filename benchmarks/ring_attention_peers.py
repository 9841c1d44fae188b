"""Other implementations of ring attention, for ``ring_attention.py`` to compare with.

They call flash-attn; here its two functions are served by torch's CPU kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Method = Callable[[], Any]


def zigzag_cut(inputs: Inputs, rank: int) -> list[torch.Tensor]:
    """This rank's tokens as every dense peer wants them, ours too."""
    last = 2 * dist.get_world_size() - 1
    chunks = [tensor.chunk(last + 1, 1) for tensor in inputs]
    return [torch.cat((of[rank], of[last - rank]), 1) for of in chunks]


def torch_ring(inputs: Inputs, rank: int) -> Method:
    """torch's own context-parallel ring, through its inner functions with the CPU kernel."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    cp._cp_options.enable_load_balance = True
    cp._cp_options.rotate_method = cp._RotateMethod.ALL_TO_ALL
    q, k, v, grad = (tensor.transpose(1, 2).contiguous() for tensor in zigzag_cut(inputs, rank))

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
    ) -> Any:
        return FORWARD(query, key, value, 0.0, is_causal)

    def backward(**of: Any) -> Any:
        names = ("grad_out", "query", "key", "value", "out", "logsumexp")
        return BACKWARD(*(of[name] for name in names), 0.0, of["is_causal"])

    def run() -> Any:
        world = dist.group.WORLD
        out, lse = cp._templated_ring_attention(world, 2, forward, q, k, v, is_causal=True)[:2]
        out = out.to(q.dtype)
        return cp._templated_ring_attention_backward(
            world, 2, backward, grad, "grad_out", q, k, v, out, lse, is_causal=True
        )

    return run


def serve_flash_attn() -> None:
    """Let ``import flash_attn`` find torch's CPU kernel, in this process."""

    def _flash_attn_forward(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = True,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        return_softmax: bool = False,
    ) -> Any:
        heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        out, lse = FORWARD(*heads_first, 0.0, causal, scale=softmax_scale)
        return out.transpose(1, 2), lse, None, None

    def _flash_attn_backward(
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        softmax_lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = True,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        rng_state: Any = None,
    ) -> None:
        tensors = [tensor.transpose(1, 2) for tensor in (dout, q, k, v, out)]
        shares = BACKWARD(*tensors, softmax_lse, 0.0, causal, scale=softmax_scale)
        for target, share in zip((dq, dk, dv), shares, strict=True):
            target.copy_(share.transpose(1, 2))

    package = types.ModuleType("flash_attn")
    interface: Any = types.ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = "2.8.0"  # type: ignore[attr-defined]
    interface._flash_attn_forward = _flash_attn_forward
    interface._flash_attn_backward = _flash_attn_backward
    interface._flash_attn_varlen_forward = interface._flash_attn_varlen_backward = None
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(package, name, None)
        setattr(interface, name, None)
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    package.__path__ = []
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})


def peer(function: Callable[..., Any], inputs: Inputs, rank: int) -> Method:
    """A zigzag ring of a peer: q, k, v [B, T, H, D] in, out."""
    *cut, grad = zigzag_cut(inputs, rank)
    extra = {"attn_type": None} if "attn_type" in inspect.signature(function).parameters else {}
    if extra:
        from yunchang.kernels import AttnType

        extra["attn_type"] = AttnType.FA

    def run() -> Any:
        tensors = [tensor.detach().requires_grad_() for tensor in cut]
        out = function(*tensors, causal=True, group=dist.group.WORLD, **extra)
        return out, torch.autograd.grad(out, tensors, grad)

    return run


def find_peers() -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Peers that can be imported, and why the others cannot."""
    found: dict[str, Callable[..., Any]] = {}
    missing: dict[str, str] = {}
    serve_flash_attn()
    for package in ("ring_flash_attn.zigzag_ring_flash_attn", "yunchang.ring"):
        package, _, module = package.partition(".")
        try:
            if package == "ring_flash_attn":
                # Its __init__ wants transformers, which the attention itself does not.
                spec = importlib.util.find_spec(package)
                if spec is None:
                    raise ImportError("not installed")
                sys.modules[package] = importlib.util.module_from_spec(spec)
            loaded = importlib.import_module(f"{package}.{module}")
            found[package] = loaded.zigzag_ring_flash_attn_func
        except Exception as error:
            missing[package] = f"{type(error).__name__}: {error}"
    return found, missing
