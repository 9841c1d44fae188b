"""Draws one token from one row's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringworld_model.sampling.grammar import Allowed
from ringworld_model.sampling.settings import DrawSettings


class DrawError(ValueError):
    """No token can be drawn; the message says why."""


def restrict(logits: Tensor, allowed: Allowed) -> Tensor:
    """Logits with -inf at every id that the grammar does not allow.

    Args:
        logits: [V], any float.
        allowed: of this modality.

    Returns:
        [V]; the same tensor where all is allowed.
    """
    if allowed.ids is None and not allowed.banned:
        return logits
    if allowed.ids is None:
        found = logits.clone()
    else:
        found = torch.full_like(logits, -torch.inf)
        ids = allowed.ids
        # Of a range, a view: a codebook's codes are many.
        here = slice(ids.start, ids.stop) if isinstance(ids, range) else list(ids)
        found[here] = logits[here]
    if allowed.banned:
        found[list(allowed.banned)] = -torch.inf
    return found


def penalised(
    logits: Tensor, settings: DrawSettings, prompt: Sequence[int], drawn: Sequence[int]
) -> Tensor:
    """Logits after repetition control, see ``DrawSettings``.

    Args:
        logits: [V].
        settings: of the modality.
        prompt: the prompt's ids of this modality.
        drawn: those drawn so far.
    """
    found = logits.clone()
    if settings.repetition_penalty != 1 and (prompt or drawn):
        seen = torch.tensor(sorted({*prompt, *drawn}), device=logits.device)
        at = found[seen]
        penalty = settings.repetition_penalty
        found[seen] = torch.where(at > 0, at / penalty, at * penalty)
    if drawn and (settings.presence_penalty or settings.frequency_penalty):
        ids, counts = torch.tensor(drawn, device=logits.device).unique(return_counts=True)
        found[ids] -= settings.presence_penalty + settings.frequency_penalty * counts
    return found


def draw(logits: Tensor, settings: DrawSettings, generator: torch.Generator) -> int:
    """One id.

    The same generator gives the same id for the same logits on any device and ring: one uniform
    number is drawn (also where greedy needs none, so that a row's later draws do not depend on how
    its earlier ones were made), and looked up in the probabilities, in order of the ids, in fp64.

    Args:
        logits: [V], -inf where an id is not allowed; at least one is finite.
        settings: of the modality.
        generator: of the row, on the CPU.

    Returns:
        An id whose logit is above -inf.

    Raises:
        DrawError: the logits are NaN, or none is above -inf.
    """
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    best = logits.max()
    if not bool(best.isfinite()):
        raise DrawError(
            f"the largest logit is {float(best)}: the model's weights or its inputs hold NaN or "
            "infinite numbers; check the checkpoint, and bf16 instead of fp16"
        )
    if settings.temperature == 0 or settings.top_k == 1:
        return int(logits.argmax())
    # The largest becomes 0: of a tiny temperature, the quotients would be infinite.
    scaled = (logits.double() - best) / settings.temperature
    chances = _kept(scaled, settings).softmax(-1).cpu()
    sums = chances.cumsum(-1)
    found = int(torch.searchsorted(sums, uniform * sums[-1], right=True))
    # Rounding may put the number at the very end, behind the last id that has a chance.
    return min(found, int(chances.nonzero()[-1]))


def _kept(logits: Tensor, settings: DrawSettings) -> Tensor:
    """-inf at ids that top_k, top_p and min_p leave out; never at all of them."""
    if 0 < settings.top_k < len(logits):
        least = logits.topk(settings.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.top_p < 1:
        ordered, ids = logits.sort(descending=True, stable=True)
        chances = ordered.softmax(-1)
        # What stands before an id must not be enough already; the first always stays.
        beyond = chances.cumsum(-1) - chances >= settings.top_p
        beyond[0] = False
        logits = logits.masked_fill(beyond.scatter(0, ids, beyond), -torch.inf)
    if settings.min_p > 0:
        least = logits.max() + torch.tensor(settings.min_p, dtype=logits.dtype).log()
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits
