"""What a stage runs on: a warning where the workers that split heads are on several nodes."""

from __future__ import annotations

from ringworld_jobs.mesh import MeshSize
from ringworld_platform.stage_setup import heads_apart


def test_heads_on_several_nodes_are_told_of() -> None:
    mesh = MeshSize(ring_size=2, data_parallel_size=1, heads_size=2)
    assert heads_apart(mesh, ["a", "a", "b", "b"]) is None
    text = heads_apart(mesh, ["a", "b", "b", "b"])
    assert text is not None and text.startswith("1 of 2 groups of 2 workers")
    assert heads_apart(MeshSize(ring_size=4, data_parallel_size=1), list("abcd")) is None
