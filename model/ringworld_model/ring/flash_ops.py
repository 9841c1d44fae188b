"""Which flash op runs: the first that imports, takes the arguments given, and is proved right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import torch

from ringworld_model.ring.flash_libraries import MAKERS
from ringworld_model.ring.flash_op import FlashOp, prove

HEAD_DIMS = range(8, 257, 8)
"""Widths that the ops take; where one of them takes less, the proof at start finds out."""


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
