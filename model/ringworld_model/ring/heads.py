"""All-to-all between tokens and heads: the ranks that share a place in the ring split its heads.

Each of N ranks brings its T tokens with all heads, and works on the N * T tokens of the ring place
with a share of the heads (Jacobs et al., DeepSpeed-Ulysses, arXiv 2309.14509). Nothing is computed
on the way, except that gradients of a key head that several ranks used are added up.

B rows, T tokens of a rank, N ranks, H heads of a tensor, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ringworld_model.ring.comm import Members, RingStats


class Heads(Members):
    """This rank's place among those of one ring place: it holds the rank-th part of the tokens."""

    argument, kind, planned = "heads_group", "heads_group", "heads_size"


def scatter_heads(
    tensors: Sequence[torch.Tensor], heads: Heads, stats: RingStats
) -> list[torch.Tensor]:
    """Exchange tokens with all heads for all tokens with this rank's heads, in one message.

    Rank r gets heads r * H / N to (r + 1) * H / N, or the one head r * H // N where there are fewer
    heads than ranks. A collective of ``heads.group``.

    Args:
        tensors: each [B, T, H, D] with its own H, see ``config.check_head_split``; one dtype.
        heads: this rank's place.
        stats: adds up bytes and waiting.

    Returns:
        Of each, [B, N * T, max(1, H / N), D], the last dim contiguous; the rank-th T tokens are
        this rank's own. The tensors themselves at N = 1.
    """
    if heads.size == 1:
        return list(tensors)
    size = heads.size
    rows, length, _, width = tensors[0].shape
    counts = [max(1, tensor.shape[2] // size) for tensor in tensors]
    message = tensors[0].new_empty(size, rows, length, sum(counts), width)
    for part, tensor in zip(message.split(counts, 3), tensors, strict=True):
        if tensor.shape[2] < size:
            tensor = tensor.repeat_interleave(size // tensor.shape[2], 2)
        part.copy_(tensor.unflatten(2, (size, -1)).movedim(2, 0))
    arrived = _exchange(message, heads, stats)
    del message, part
    # Tokens of the ring place follow one another by rank: a view where there is one row.
    return list(arrived.transpose(0, 1).flatten(1, 2).split(counts, 2))


def gather_heads(
    tensors: Sequence[torch.Tensor],
    num_heads: Sequence[int],
    heads: Heads,
    stats: RingStats,
) -> list[torch.Tensor]:
    """Exchange all tokens with this rank's heads for this rank's tokens with all heads.

    The inverse of ``scatter_heads`` and, for gradients, its transpose: what several ranks have of
    one head is added up, in the tensor's dtype and by rank. One message, or two where the tensors
    have two dtypes. A collective of ``heads.group``.

    Args:
        tensors: each [B, N * T, max(1, H / N), D].
        num_heads: H of each.
        heads: this rank's place.
        stats: adds up bytes and waiting.

    Returns:
        Of each, [B, T, H, D], the last dim contiguous. The tensors themselves at N = 1.
    """
    if heads.size == 1:
        return list(tensors)
    found: list[torch.Tensor] = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [at for at, tensor in enumerate(tensors) if tensor.dtype == dtype]
        parts = [tensors[at].unflatten(1, (heads.size, -1)).transpose(0, 1) for at in alike]
        message = (torch.cat(parts, 3) if len(parts) > 1 else parts[0]).contiguous()
        arrived = _exchange(message, heads, stats)
        del message
        sizes = [part.shape[3] for part in parts]
        for at, part in zip(alike, arrived.split(sizes, 3), strict=True):
            whole = part.movedim(0, 2).flatten(2, 3)
            if num_heads[at] < heads.size:
                whole = whole.unflatten(2, (num_heads[at], -1)).sum(3)
            found[at] = whole
    return found


def _exchange(message: torch.Tensor, heads: Heads, stats: RingStats) -> torch.Tensor:
    """Send message[r] to rank r; return what each rank sent here, [N, ...] by rank."""
    arrived = torch.empty_like(message)
    # As bytes: gloo does not exchange every dtype.
    sent, room = (tensor.flatten(1).view(torch.uint8) for tensor in (message, arrived))
    with stats.waiting(message.device):
        dist.all_to_all_single(room, sent, group=heads.group)
    stats.bytes_sent += sent.numel() // heads.size * (heads.size - 1)
    return arrived
