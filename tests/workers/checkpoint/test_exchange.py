"""JSON between ranks, over real gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringworld_workers.checkpoint.exchange import all_gather_json, broadcast_json, gather_json
from ringworld_workers.mesh import build_mesh


def exchange(rank: int, world_size: int) -> dict[str, Any]:
    mesh = build_mesh(1, world_size)
    # Of very different lengths, and with letters of several bytes.
    value = {"rank": rank, "text": "ü" * (rank * 10_000), "none": None, "list": [1, 2.5]}
    return {
        "gathered": gather_json(value, mesh),
        "all": all_gather_json(value, mesh),
        "told": broadcast_json(value if rank == 0 else "ignored", mesh),
        "nothing": broadcast_json(None, mesh),
    }


def test_values_travel_whole(run_gang: Callable[..., list[Any]]) -> None:
    values = [
        {"rank": rank, "text": "ü" * (rank * 10_000), "none": None, "list": [1, 2.5]}
        for rank in range(3)
    ]
    for rank, found in enumerate(run_gang(exchange, 3)):
        assert found["gathered"] == (values if rank == 0 else None)
        assert found["all"] == values
        assert found["told"] == values[0]
        assert found["nothing"] is None
