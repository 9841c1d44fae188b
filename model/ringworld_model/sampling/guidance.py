"""Classifier-free guidance: what the prompt adds to the model's own idea of a picture, amplified.

In a clip a second row of the session, which has the clip but not the prompt, gets the same tokens.
LWM's prompt for it is bos and ``<vision>``. Source: arXiv 2207.12598; with s = 1 there is none.
"""

from __future__ import annotations

from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``unconditional + scale * (conditional - unconditional)``.

    Args:
        conditional: logits [..., V] with the prompt.
        unconditional: logits [..., V] without it.
        scale: 1 gives the first back, 0 the second; more is nearer to the prompt.
    """
    return unconditional + scale * (conditional - unconditional)
