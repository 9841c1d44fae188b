"""What is recomputed in the backward pass rather than kept: activation checkpointing.

Modes, per layer, from most memory to least:
- ``none`` keeps every intermediate.
- ``attention_saved`` keeps the attention's inputs and output and recomputes the rest, so that the
  backward pass does not run the ring's forward a second time.
- ``full`` keeps the layer's input alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

ActivationCheckpointing = Literal["none", "attention_saved", "full"]


def check_mode(mode: str) -> ActivationCheckpointing:
    """The mode, if there is one of that name.

    Raises:
        ValueError: unknown mode; lists those that exist.
    """
    for known in get_args(ActivationCheckpointing):
        if mode == known:
            return known
    raise ValueError(
        f"memory.activation_checkpointing={mode!r} is unknown; "
        f"use one of {', '.join(get_args(ActivationCheckpointing))}"
    )


def recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function(*args, **kwargs)``, keep only those, and call it again in the backward pass.

    The function must use no random numbers. Everything that it calls runs twice on every rank, in
    the same order, collectives included: what ZeRO-3 gathers is gathered again.

    Args:
        function: pure function of its arguments and of module parameters.
        *args: tensors, or anything that lives until the backward pass.
        **kwargs: likewise.

    Returns:
        What the function returns.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # It must stop early, at the last tensor that the backward pass wants: a call that ran to its
    # end would pass the hook with which ZeRO-3 releases the last module's parameters, whose
    # gradients are being made at that moment.
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        early_stop=True,
        **kwargs,
    )
