"""The flash ops that libraries have: flash-attn 4, 3 and 2, and torch's own.

Signatures were read in flash-attn-4 4.0.0b36 (flash_attn/cute/interface.py), flash-attn 3
(hopper/flash_api.cpp), flash-attn 2.7 and 2.8 (flash_attn/flash_attn_interface.py) and torch 2.13;
a version that differs is refused, and said to be. Window, softcap and the like stay at their
defaults.

All of them sum dq in any order unless ``torch.use_deterministic_algorithms(True)`` is on.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from ringworld_model.ring.flash_op import FlashOp
from ringworld_model.ring.varlen import Sequences


def flash_attn_4() -> FlashOp:
    """flash-attn 4: pure Python and the CUTLASS DSL."""
    interface = importlib.import_module("flash_attn.cute.interface")

    def forward(q: Any, k: Any, v: Any, sequences: Sequences, scale: float) -> Any:
        given = _named(sequences)
        result = interface._flash_attn_fwd(
            q, k, v, **given, softmax_scale=scale, causal=sequences.causal, return_lse=True
        )
        return result[:2]

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, sequences: Sequences, scale: float
    ) -> Any:
        return interface._flash_attn_bwd(
            q,
            k,
            v,
            out,
            grad,
            lse,
            **_named(sequences),
            softmax_scale=scale,
            causal=sequences.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )[:3]

    common = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale causal"
    check_arguments(interface._flash_attn_fwd, f"{common} return_lse")
    check_arguments(interface._flash_attn_bwd, f"{common} out dout lse deterministic")
    return FlashOp("flash-attn 4", forward, backward)


def flash_attn_3() -> FlashOp:
    """flash-attn 3: the ops that its extension registers with torch."""
    importlib.import_module("flash_attn_interface")
    library = torch.ops.flash_attn_3

    def forward(q: Any, k: Any, v: Any, sequences: Sequences, scale: float) -> Any:
        # One split: more of them would be summed in any order.
        given = dict(softmax_scale=scale, is_causal=sequences.causal, num_splits=1)
        return library.fwd(q, k, v, **_named(sequences), **given)[:2]

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, sequences: Sequences, scale: float
    ) -> Any:
        grads = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
        library.bwd(
            grad,
            q,
            k,
            v,
            out,
            lse,
            *grads,
            **_named(sequences),
            softmax_scale=scale,
            is_causal=sequences.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    common = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale is_causal"
    check_arguments(library.fwd, f"{common} num_splits")
    check_arguments(library.bwd, f"{common} dout out softmax_lse dq dk dv deterministic")
    return FlashOp("flash-attn 3", forward, backward)


def flash_attn_2() -> FlashOp:
    """flash-attn 2, from 2.7 on."""
    interface = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(q: Any, k: Any, v: Any, sequences: Sequences, scale: float) -> Any:
        given = dict(dropout_p=0.0, softmax_scale=scale, causal=sequences.causal)
        return interface._flash_attn_varlen_forward(q, k, v, **_named(sequences), **given)[:2]

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, sequences: Sequences, scale: float
    ) -> Any:
        grads = tuple(torch.empty_like(tensor) for tensor in (q, k, v))
        interface._flash_attn_varlen_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            *grads,
            **_named(sequences),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=sequences.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads

    common = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    common = f"{common} dropout_p softmax_scale causal"
    windows = "window_size_left window_size_right softcap alibi_slopes"
    check_arguments(interface._flash_attn_varlen_forward, common)
    check_arguments(
        interface._flash_attn_varlen_backward,
        f"{common} dout out softmax_lse dq dk dv {windows} deterministic",
    )
    return FlashOp("flash-attn 2", forward, backward)


def torch_flash() -> FlashOp:
    """torch's own flash-attn 2; nothing to install."""
    ops = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, sequences: Sequences, scale: float) -> Any:
        return ops._flash_attention_forward(
            q, k, v, *sequences[:4], 0.0, sequences.causal, False, scale=scale
        )[:2]

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, sequences: Sequences, scale: float
    ) -> Any:
        # The random state of a dropout that is not there.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        settings = 0.0, sequences.causal, state, state[0]
        return ops._flash_attention_backward(
            grad, q, k, v, out, lse, *sequences[:4], *settings, scale=scale
        )

    return FlashOp("torch's flash attention", forward, backward)


MAKERS = (flash_attn_4, flash_attn_3, flash_attn_2, torch_flash)
"""In the order of preference."""


def check_arguments(call: Any, names: str) -> None:
    """Refuse a call whose arguments are not what is given here.

    Args:
        call: a function, or an op of torch.
        names: the arguments given, parted by spaces.

    Raises:
        ValueError: it does not take one of them, or needs another.
    """
    overload = getattr(call, "_opoverload", None) or getattr(call, "default", None)
    if overload is not None:
        taken = {of.name: not of.has_default_value() for of in overload._schema.arguments}
    else:
        parameters = inspect.signature(call).parameters
        taken = {name: of.default is of.empty for name, of in parameters.items()}
    given = set(names.split())
    unknown = given - taken.keys()
    missing = {name for name, needed in taken.items() if needed} - given
    if unknown or missing:
        raise ValueError(
            "another version: "
            + "; ".join(
                f"{what} {', '.join(sorted(some))}"
                for what, some in (("does not take", unknown), ("needs", missing))
                if some
            )
        )


def _named(sequences: Sequences) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, sequences[:4], strict=True))
