from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringworld_workers.mesh import build_mesh


def describe(rank: int, world_size: int, ring_size: int) -> dict[str, Any]:
    mesh = build_mesh(ring_size, world_size // ring_size)
    members = {}
    for name in ("sequence_parallel", "data_parallel", "world", "control"):
        group = getattr(mesh, f"{name}_group")
        total = torch.tensor([2.0**rank])
        dist.all_reduce(total, group=group)  # the sum says who takes part
        members[name] = int(total)
    return {
        "rank": mesh.rank,
        "ring": mesh.sequence_parallel_rank,
        "data": mesh.data_parallel_rank,
        "control_backend": dist.get_backend(mesh.control_group),
        "device": str(mesh.device),
        **members,
    }


def test_rings_are_neighbouring_ranks(run_gang: Callable[..., list[Any]]) -> None:
    found = run_gang(describe, 4, 2)
    assert [(f["data"], f["ring"]) for f in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [f["sequence_parallel"] for f in found] == [0b0011, 0b0011, 0b1100, 0b1100]
    assert [f["data_parallel"] for f in found] == [0b0101, 0b1010, 0b0101, 0b1010]
    assert all(f["world"] == f["control"] == 0b1111 for f in found)
    assert all(f["control_backend"] == "gloo" for f in found)


def test_one_rank_is_a_mesh_too(run_gang: Callable[..., list[Any]]) -> None:
    (found,) = run_gang(describe, 1, 1)
    assert (found["sequence_parallel"], found["data_parallel"], found["device"]) == (1, 1, "cpu")


def refuse(rank: int, world_size: int) -> str:
    try:
        build_mesh(3, 1)
    except ValueError as error:
        return str(error)
    return ""


def test_a_mesh_that_does_not_cover_the_world_is_refused(
    run_gang: Callable[..., list[Any]],
) -> None:
    for message in run_gang(refuse, 2):
        assert "sequence_parallel=3 x data_parallel=1 does not cover world_size=2" in message


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
