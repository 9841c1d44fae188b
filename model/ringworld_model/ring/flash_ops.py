"""The flash ops there are: flash-attn 4, 3 and 2, and torch's own, behind one shape.

The first one runs that imports, takes the arguments given here, and gives right numbers for a small
problem on the device. Signatures were read in flash-attn-4 4.0.0b36 (flash_attn/cute/interface.py),
flash-attn 3 (hopper/flash_api.cpp), flash-attn 2.7 and 2.8 (flash_attn/flash_attn_interface.py) and
torch 2.13; a version that differs is refused, and said to be. Window, softcap and the like stay at
their defaults.

All of them sum dq in any order unless ``torch.use_deterministic_algorithms(True)`` is on.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ringworld_model.ring.reference import ReferenceKernel
from ringworld_model.ring.varlen import Sequences
from ringworld_model.ring.varlen_op import BlockwiseOp

HEAD_DIMS = range(8, 257, 8)
"""Widths that the ops take; where one of them takes less, the proof at start finds out."""

DTYPES = ("bfloat16", "float16")

_PROOF_ERROR = 0.02
"""Norm error over norm that an op may show: bf16 makes 3e-3, a wrong mask or lse 0.1 and more."""

Run = Callable[..., Any]


@dataclass(frozen=True)
class FlashOp:
    """A ``VarlenOp`` of a library.

    Attributes:
        name: of the library.
        run_forward: (q, k, v, sequences, scale) -> (out, lse) as the library gives them.
        run_backward: (grad_out, q, k, v, out, lse, sequences, scale) -> (dq, dk, dv).
        tokens_first: the library's lse is [T, H] and not [H, T]. Documentation disagrees about
            it, so ``prove`` finds out.
    """

    name: str
    run_forward: Run
    run_backward: Run
    tokens_first: bool = False

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``VarlenOp.forward``.

        Raises:
            RuntimeError: out or lse is not of the shape that was proved.
        """
        out, lse = self.run_forward(q, k, v, sequences, scale)
        heads_first = lse.transpose(0, 1) if self.tokens_first and lse.dim() == 2 else lse
        if out.shape != q.shape or heads_first.shape != (q.shape[1], q.shape[0]):
            raise RuntimeError(
                f"{self.name} gives out {tuple(out.shape)} and lse {tuple(lse.shape)} for q "
                f"{tuple(q.shape)}; use attention.backend: triton, or another version"
            )
        return out, heads_first

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``VarlenOp.backward``."""
        lse = (lse.transpose(0, 1) if self.tokens_first else lse).contiguous()
        dq, dk, dv = self.run_backward(grad_out, q, k, v, out, lse, sequences, scale)
        return dq, dk, dv


class ChosenOp(NamedTuple):
    """An op, and why it was taken: its name, and what kept each better one away."""

    op: FlashOp
    why: str


@lru_cache(maxsize=64)
def choose_op(device: torch.device, dtype: torch.dtype, head_dim: int) -> ChosenOp:
    """Choose the op for a device, dtype and width; the proof runs on the device, once.

    Raises:
        ValueError: none runs; says why not, op by op.
    """
    if dtype not in (torch.bfloat16, torch.float16) or head_dim not in HEAD_DIMS:
        raise ValueError(
            "attention.backend='flash' takes bfloat16 and float16 and a head_dim of 8 to 256 in "
            f"steps of 8, not {dtype} and {head_dim}; use attention.backend: triton"
        )
    return first_proved(MAKERS, device, dtype, head_dim)


def first_proved(
    makers: Iterable[Callable[[], FlashOp]],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> ChosenOp:
    """Return the first op that can be made and passes ``prove``.

    Args:
        makers: each returns an op, or raises with the reason why there is none.
        device: where the op must run.
        dtype: of q, k and v.
        head_dim: D.

    Raises:
        ValueError: none passes; says why not, op by op.
    """
    refused = []
    for make in makers:
        try:
            op = prove(make(), device, dtype, head_dim)
        # Whatever a library throws where it cannot serve: a symbol or an architecture that is
        # missing, a compiler that fails. The next one may serve.
        except Exception as error:
            said = str(error).strip() or type(error).__name__
            refused.append(f"{make.__name__} ({said.splitlines()[0][:200]})")
            continue
        return ChosenOp(op, op.name + (f"; not {'; not '.join(refused)}" if refused else ""))
    raise ValueError(
        f"attention.backend='flash' has no op for {dtype} and head_dim {head_dim} on {device}: not "
        f"{'; not '.join(refused)}; use attention.backend: triton"
    )


def prove(op: FlashOp, device: torch.device, dtype: torch.dtype, head_dim: int) -> FlashOp:
    """Compare an op with fp64, computed on the CPU, on small problems; find its layout of lse.

    Sequences of 5, 19 and 1 tokens, causal and in full, and sequences of one query each, for which
    libraries have ways of their own. The backward pass gets an out and an lse that are not the
    forward pass's own, as a ring gives it.

    Returns:
        The op, with ``tokens_first`` as it is.

    Raises:
        ValueError: an unknown shape, or a wrong number.
    """
    generator = torch.Generator().manual_seed(0)
    reference, scale = BlockwiseOp(ReferenceKernel()), head_dim**-0.5
    several, single = torch.tensor([0, 5, 24, 25]), torch.arange(4)
    for causal, name, queries, keys in (
        (True, "causal", several, several),
        (False, "full", several, several),
        (True, "causal one-token", single, single),
        (False, "full one-query", single, several),
    ):
        total = int(queries[-1])
        longest_queries, longest_keys = (int(of.diff().max()) for of in (queries, keys))
        q, grad_out, k, v = (
            torch.randn(int(of[-1]), heads, head_dim, generator=generator).to(dtype)
            for of, heads in ((queries, 4), (queries, 4), (keys, 2), (keys, 2))
        )
        here = Sequences(queries.int(), keys.int(), longest_queries, longest_keys, causal)
        out, lse = reference.forward(q, k, v, here, scale)
        # As if keys elsewhere weighed as much as all keys here, and held zeros.
        rest = [(out / 2).to(dtype), (lse + 0.6931).float()]
        wanted = (out, lse, *reference.backward(grad_out, q, k, v, *rest, here, scale))

        there = here._replace(cu_queries=queries.int().to(device), cu_keys=keys.int().to(device))
        q, grad_out, k, v, *rest = (of.to(device) for of in (q, grad_out, k, v, *rest))
        lse = op.run_forward(q, k, v, there, scale)[1]
        if lse.shape not in ((4, total), (total, 4)):
            raise ValueError(f"lse has the unknown shape {tuple(lse.shape)}")
        op = replace(op, tokens_first=lse.shape[0] == total)
        got = (
            *op.forward(q, k, v, there, scale),
            *op.backward(grad_out, q, k, v, *rest, there, scale),
        )
        for which, one, other in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
            error = norm_error(one.cpu().double(), other.double())
            if not error <= _PROOF_ERROR:
                raise ValueError(f"wrong {which} of {name} sequences, off by {error:.1e}")
    return op


def norm_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the error over the norm."""
    return float((got - wanted).norm() / wanted.norm())


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
