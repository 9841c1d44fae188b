"""Plain JSON values between the ranks of a gang: nothing is pickled on the way of a checkpoint.

All functions are collectives on the mesh's control group: every rank calls them, in the same order.
A value travels as JSON does: tuples arrive as lists, keys as strings.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from ringworld_workers.mesh import Mesh


def gather_json(value: Any, mesh: Mesh) -> list[Any] | None:
    """Every rank's value, by rank, on rank 0; None on the others.

    Args:
        value: of this rank: anything that ``json.dumps`` takes.
        mesh: whose ranks take part.

    Raises:
        TypeError: the value is not JSON; the other ranks would wait, so check before.
    """
    data, lengths = _padded(value, mesh)
    parts = [torch.empty_like(data) for _ in lengths] if mesh.rank == 0 else None
    dist.gather(data, parts, dst=0, group=mesh.control_group)
    return None if parts is None else _values(parts, lengths)


def all_gather_json(value: Any, mesh: Mesh) -> list[Any]:
    """Every rank's value, by rank, on all ranks. See ``gather_json``."""
    data, lengths = _padded(value, mesh)
    parts = [torch.empty_like(data) for _ in lengths]
    dist.all_gather(parts, data, group=mesh.control_group)
    return _values(parts, lengths)


def broadcast_json(value: Any, mesh: Mesh) -> Any:
    """Rank 0's value on all ranks; what the others hand in is ignored. See ``gather_json``."""
    data = _encoded(value) if mesh.rank == 0 else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([data.numel()])
    dist.broadcast(length, src=0, group=mesh.control_group)
    if mesh.rank != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=mesh.control_group)
    return _decoded(data)


def _padded(value: Any, mesh: Mesh) -> tuple[torch.Tensor, list[int]]:
    """This rank's bytes [longest] uint8, padded to the longest of all, and every rank's length."""
    data = _encoded(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(mesh.world_size)]
    dist.all_gather(lengths, torch.tensor([data.numel()]), group=mesh.control_group)
    counts = [int(length) for length in lengths]
    padded = torch.zeros(max(counts), dtype=torch.uint8)
    padded[: data.numel()] = data
    return padded, counts


def _values(parts: list[torch.Tensor], lengths: list[int]) -> list[Any]:
    return [_decoded(part[:length]) for part, length in zip(parts, lengths, strict=True)]


def _encoded(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
