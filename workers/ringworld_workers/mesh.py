"""Where a rank stands: rings of sequence-parallel ranks, side by side along the data-parallel axis.

Ranks of a ring are neighbours (``rank = data_parallel_rank * sequence_parallel_size +
sequence_parallel_rank``), so that a ring stays inside a node where it can. Those of one ring place,
which split the heads among them, are nearer still (``sequence_parallel_rank = ring_rank *
heads_size + heads_rank``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the mesh, and the process groups that it takes part in."""

    rank: int
    world_size: int
    sequence_parallel_size: int
    sequence_parallel_rank: int
    sequence_parallel_group: dist.ProcessGroup
    """Ranks that hold cuts of the same rows: heads_size of them at each place of the ring."""
    ring_size: int
    ring_group: dist.ProcessGroup | None
    """Of each place of the ring the rank with this rank's share of the heads; None: one place."""
    heads_size: int
    heads_group: dist.ProcessGroup | None
    """The ranks of this rank's place, which split the heads among them; None: no split."""
    data_parallel_size: int
    data_parallel_rank: int
    data_parallel_group: dist.ProcessGroup
    """Ranks that hold the same cut of different rows."""
    world_group: dist.ProcessGroup
    """All ranks, on the device's backend: gradients."""
    control_group: dist.ProcessGroup
    """All ranks, on gloo: small CPU messages that must not queue behind the device's work."""
    device: torch.device


def build_mesh(
    sequence_parallel_size: int,
    data_parallel_size: int,
    device: str | torch.device = "cpu",
    timeout: timedelta | None = None,
    *,
    heads_size: int = 1,
) -> Mesh:
    """Cut the initialised world into rings. A collective: every rank calls it once.

    Args:
        sequence_parallel_size: ranks that share one sequence: places of a ring * heads_size.
        data_parallel_size: number of rings.
        device: where this rank computes; ``cuda`` means the process's current CUDA device.
        timeout: after which a collective of these groups fails; they do not take that of the
            initialised world. Empty: torch's own, up to half an hour.
        heads_size: ranks of one ring place.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the sizes are not positive, their product is not the world size, or heads_size
            does not divide sequence_parallel_size.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised; call init_process_group before build_mesh, "
            "also with a single rank"
        )
    world_size, rank = dist.get_world_size(), dist.get_rank()
    product = sequence_parallel_size * data_parallel_size
    if min(sequence_parallel_size, data_parallel_size) < 1 or product != world_size:
        raise ValueError(
            f"mesh sequence_parallel={sequence_parallel_size} x data_parallel={data_parallel_size} "
            f"does not cover world_size={world_size}; their product must equal it"
        )
    if heads_size < 1 or sequence_parallel_size % heads_size:
        raise ValueError(
            f"mesh sequence_parallel={sequence_parallel_size} ranks are no whole number of ring "
            f"places of heads={heads_size}; heads must divide them"
        )
    data_parallel_rank, sequence_parallel_rank = divmod(rank, sequence_parallel_size)
    rings = [
        [ring * sequence_parallel_size + place for place in range(sequence_parallel_size)]
        for ring in range(data_parallel_size)
    ]
    columns = [list(column) for column in zip(*rings, strict=True)]
    # Every rank creates every group, in the same order: new_group is a collective of the world.
    ring_groups = [dist.new_group(ranks, timeout=timeout) for ranks in rings]
    column_groups = [dist.new_group(ranks, timeout=timeout) for ranks in columns]
    ring_group: dist.ProcessGroup | None = ring_groups[data_parallel_rank]
    heads_group: dist.ProcessGroup | None = None
    if heads_size > 1:
        shares = [ranks[share::heads_size] for ranks in rings for share in range(heads_size)]
        ring_group = _group_of(rank, shares, timeout)
        places = [list(range(at, at + heads_size)) for at in range(0, world_size, heads_size)]
        heads_group = _group_of(rank, places, timeout)
    world = list(range(world_size))
    return Mesh(
        rank=rank,
        world_size=world_size,
        sequence_parallel_size=sequence_parallel_size,
        sequence_parallel_rank=sequence_parallel_rank,
        sequence_parallel_group=ring_groups[data_parallel_rank],
        ring_size=sequence_parallel_size // heads_size,
        ring_group=ring_group,
        heads_size=heads_size,
        heads_group=heads_group,
        data_parallel_size=data_parallel_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_group=column_groups[sequence_parallel_rank],
        world_group=dist.new_group(world, timeout=timeout),
        control_group=dist.new_group(world, timeout=timeout, backend="gloo"),
        device=_current_device(device),
    )


def _group_of(
    rank: int, parts: list[list[int]], timeout: timedelta | None
) -> dist.ProcessGroup | None:
    """The rank's own group of those that all ranks create; None where it would be alone."""
    found = None
    for ranks in parts:
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=timeout)
            found = group if rank in ranks else found
    return found


def _current_device(device: str | torch.device) -> torch.device:
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found
