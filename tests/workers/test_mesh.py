from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringworld_workers.mesh import build_mesh


def describe(
    rank: int, world_size: int, sequence_parallel_size: int, heads_size: int = 1
) -> dict[str, Any]:
    rings = world_size // sequence_parallel_size
    mesh = build_mesh(sequence_parallel_size, rings, heads_size=heads_size)
    members: dict[str, Any] = {}
    for name in ("sequence_parallel", "ring", "heads", "data_parallel", "world", "control"):
        group = getattr(mesh, f"{name}_group")
        if group is None:
            members[name] = None
            continue
        total = torch.tensor([2.0**rank])
        dist.all_reduce(total, group=group)  # the sum says who takes part
        members[name] = int(total)
    return {
        "rank": mesh.rank,
        "place": mesh.sequence_parallel_rank,
        "sizes": (mesh.ring_size, mesh.heads_size),
        "data": mesh.data_parallel_rank,
        "control_backend": dist.get_backend(mesh.control_group),
        "device": str(mesh.device),
        **members,
    }


def test_rings_are_neighbouring_ranks(run_gang: Callable[..., list[Any]]) -> None:
    found = run_gang(describe, 4, 2)
    assert [(f["data"], f["place"]) for f in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [f["sequence_parallel"] for f in found] == [0b0011, 0b0011, 0b1100, 0b1100]
    assert [f["data_parallel"] for f in found] == [0b0101, 0b1010, 0b0101, 0b1010]
    assert [f["ring"] for f in found] == [0b0011, 0b0011, 0b1100, 0b1100]
    assert all(f["heads"] is None and f["sizes"] == (2, 1) for f in found)
    assert all(f["world"] == f["control"] == 0b1111 for f in found)
    assert all(f["control_backend"] == "gloo" for f in found)


def test_one_rank_is_a_mesh_too(run_gang: Callable[..., list[Any]]) -> None:
    (found,) = run_gang(describe, 1, 1)
    assert (found["sequence_parallel"], found["data_parallel"], found["device"]) == (1, 1, "cpu")


def test_ranks_that_split_heads_are_the_nearest_neighbours(
    run_gang: Callable[..., list[Any]],
) -> None:
    found = run_gang(describe, 8, 4, 2)
    assert [f["place"] for f in found] == [0, 1, 2, 3] * 2
    assert all(f["sizes"] == (2, 2) for f in found)
    assert [f["heads"] for f in found[::2]] == [0b11, 0b11 << 2, 0b11 << 4, 0b11 << 6]
    assert [f["heads"] for f in found[1::2]] == [f["heads"] for f in found[::2]]
    assert [f["ring"] for f in found] == [0b0101, 0b1010] * 2 + [0b0101 << 4, 0b1010 << 4] * 2
    assert [f["sequence_parallel"] for f in found] == [0xF] * 4 + [0xF0] * 4
    assert [f["data_parallel"] for f in found] == [0x11, 0x22, 0x44, 0x88] * 2


def test_heads_alone_need_no_ring(run_gang: Callable[..., list[Any]]) -> None:
    found = run_gang(describe, 2, 2, 2)
    assert [(f["sizes"], f["ring"], f["heads"]) for f in found] == [((1, 2), None, 0b11)] * 2


def refuse(rank: int, world_size: int) -> list[str]:
    said = []
    for sizes in ((3, 1, 1), (2, 1, 4)):
        try:
            build_mesh(*sizes[:2], heads_size=sizes[2])
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_mesh_that_does_not_cover_the_world_is_refused(
    run_gang: Callable[..., list[Any]],
) -> None:
    for mesh, heads in run_gang(refuse, 2):
        assert "sequence_parallel=3 x data_parallel=1 does not cover world_size=2" in mesh
        assert "sequence_parallel=2 ranks are no whole number of ring places of heads=4" in heads


def test_an_uninitialised_world_is_refused() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        build_mesh(1, 1)


def wait_for_a_lost_peer(rank: int, world_size: int) -> list[str]:
    mesh = build_mesh(1, world_size, timeout=timedelta(seconds=1))
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:  # alive, but takes part in nothing
        store.wait(["given up"], timedelta(seconds=20))
        return []
    said = []
    for group in (mesh.control_group, mesh.world_group):
        try:
            dist.all_reduce(torch.zeros(1), group=group)
        except RuntimeError as error:
            said.append(str(error))
    store.set("given up", "yes")
    return said


def test_the_groups_give_up_after_the_meshs_timeout(run_gang: Callable[..., list[Any]]) -> None:
    found, _ = run_gang(wait_for_a_lost_peer, 2, timeout=30.0)
    assert len(found) == 2
