"""The documented rule for automatic axes, and that defaults reach the stages as documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ringworld_jobs.load import load_job
from ringworld_jobs.mesh import (
    LOCAL_TOKENS,
    MeshError,
    MeshSize,
    allowed_meshes,
    resolve_mesh,
    shrink_mesh,
)
from ringworld_jobs.plan import plan_stages
from ringworld_jobs.spec import ResourcesSpec, StageSpec


def stage(context: int, rows: int, *, micro: int = 1, **mesh: Any) -> StageSpec:
    return StageSpec.model_validate(
        {
            "name": "s",
            "context_length": context,
            "rope_theta": 1e4,
            "steps": 1,
            "global_batch_tokens": context * rows,
            "micro_batch_size": micro,
            "mesh": mesh,
            "mixture": {"x": 1},
            "learning_rate": {"peak": 1},
        }
    )


def workers(fewest: int, most: int) -> ResourcesSpec:
    return ResourcesSpec.model_validate({"workers": {"min": fewest, "max": most}})


@pytest.mark.parametrize(
    ("spec", "resources", "mesh"),
    [
        (stage(2**12, 8), workers(1, 8), (1, 8)),
        (stage(2**17, 8), workers(1, 8), (4, 2)),
        (stage(2**20, 4), workers(1, 8), (8, 1)),  # 32 wanted, 8 there are
        (stage(2**12, 6), workers(1, 4), (1, 3)),  # 4 do not share 6 rows evenly
        (stage(2**12, 1), workers(4, 4), (4, 1)),  # one row: the ring grows to the minimum
        (stage(2**12, 6), workers(4, 4), (2, 2)),
        (stage(2**17, 8, micro=2), workers(1, 64), (4, 4)),
        (stage(2**12, 8, sequence_parallel=2), workers(1, 7), (2, 2)),
        (stage(2**17, 8, data_parallel=4), workers(1, 8), (2, 4)),
        (stage(2**12, 8, data_parallel=1), workers(3, 8), (3, 1)),
        (stage(2**12, 8, sequence_parallel={"ring": 3}), workers(1, 8), (3, 2)),
        (stage(2**12, 8, sequence_parallel={"ring": 2, "heads": 2}), workers(1, 9), (2, 2, 2)),
        (stage(2**12, 8, sequence_parallel={"heads": 4}), workers(1, 7), (1, 1, 4)),
    ],
)
def test_automatic_axes(spec: StageSpec, resources: ResourcesSpec, mesh: tuple[int, ...]) -> None:
    assert resolve_mesh(spec, resources) == MeshSize(*mesh)


@pytest.mark.parametrize(
    ("spec", "resources", "field", "words"),
    [
        (stage(2**12, 8, data_parallel=16), workers(1, 8), "mesh.data_parallel", "64Ki"),
        (stage(2**12, 8, data_parallel=8), workers(1, 4), "mesh.data_parallel", "raise it to 8"),
        (stage(2**12, 3, micro=2), workers(1, 4), "micro_batch_size", "8Ki or 16Ki"),
        (
            stage(2**12, 1, sequence_parallel=2),
            workers(4, 4),
            "mesh.sequence_parallel",
            "min is 4; lower it to 2",
        ),
        (
            stage(2**12, 8, sequence_parallel=9),
            workers(1, 8),
            "mesh.sequence_parallel",
            "lower mesh.sequence_parallel",
        ),
        (
            stage(2**12, 8, sequence_parallel={"ring": 4, "heads": 2}, data_parallel=2),
            workers(1, 8),
            "mesh.sequence_parallel",
            "ring 4 x heads 2 x data_parallel 2 = 16 .* raise it to 16",
        ),
    ],
)
def test_what_does_not_fit_says_what_would(
    spec: StageSpec, resources: ResourcesSpec, field: str, words: str
) -> None:
    with pytest.raises(MeshError, match=words) as caught:
        resolve_mesh(spec, resources)
    assert caught.value.field == field


@given(
    st.integers(4, 20),
    st.integers(1, 64),
    st.integers(1, 4),
    st.integers(1, 32),
    st.integers(0, 32),
)
def test_a_chosen_mesh_always_fits(
    log_context: int, micro_batches: int, micro: int, fewest: int, more: int
) -> None:
    spec = stage(2**log_context, micro_batches * micro, micro=micro)
    resources = workers(fewest, fewest + more)
    mesh = resolve_mesh(spec, resources)
    assert mesh.heads_size == 1
    assert fewest <= mesh.world_size <= fewest + more
    assert spec.rows_per_step % (mesh.data_parallel_size * micro) == 0
    ring_size = mesh.ring_size
    assert ring_size * LOCAL_TOKENS >= spec.context_length or ring_size == fewest + more


WHOLE_RINGS = ResourcesSpec.model_validate({"workers": {"max": 64}})
"""No minimum given."""


@pytest.mark.parametrize(
    ("spec", "resources", "available", "mesh"),
    [
        (stage(2**19, 4), workers(1, 64), 63, (16, 2)),  # 3 rings do not share 4 rows evenly
        (stage(2**19, 4), workers(1, 64), 31, (16, 1)),
        (stage(2**19, 4), workers(1, 64), 15, (15, 1)),
        (stage(2**19, 4), workers(16, 64), 15, None),
        (stage(2**19, 4), WHOLE_RINGS, 31, (16, 1)),
        (stage(2**19, 4), WHOLE_RINGS, 15, None),
        (stage(2**19, 4), workers(1, 64), 0, None),
        (stage(2**12, 8, sequence_parallel=4, data_parallel=2), workers(1, 8), 7, (4, 1)),
        # One ring of 4 would leave too few workers: the minimum goes before the order.
        (stage(2**12, 8, sequence_parallel=4, data_parallel=2), workers(5, 8), 7, (3, 2)),
        (stage(2**12, 8, sequence_parallel={"ring": 3, "heads": 2}), workers(1, 6), 5, (2, 1, 2)),
        (stage(2**12, 8, sequence_parallel={"heads": 8}), workers(1, 8), 7, (1, 1, 4)),
    ],
)
def test_rings_go_first_then_the_ring_shrinks(
    spec: StageSpec, resources: ResourcesSpec, available: int, mesh: tuple[int, ...] | None
) -> None:
    found = shrink_mesh(spec, resources, available)
    assert found == (None if mesh is None else MeshSize(*mesh))


def test_a_split_of_the_heads_shrinks_to_what_the_model_allows() -> None:
    spec = stage(2**12, 4, sequence_parallel={"heads": 12})
    found = shrink_mesh(spec, workers(1, 12), 9, may_split=lambda heads: 4 % heads == 0)
    assert found == MeshSize(2, 1, 4)
    assert allowed_meshes(stage(2**12, 6), workers(2, 8)) == [
        MeshSize(1, rings) for rings in (6, 3, 2)
    ]


def test_a_plan_tells_the_smaller_meshes(tmp_path: Path) -> None:
    text = DEFAULTS.replace("defaults:", "resources: {workers: {min: 2, max: 8}}\ndefaults:")
    (tmp_path / "job.yaml").write_text(text)
    plans = plan_stages(load_job(tmp_path / "job.yaml", check_files=False))
    assert [plan.world_size for plan in plans] == [8, 4]
    assert [[mesh.world_size for mesh in plan.smaller_meshes] for plan in plans] == [[4, 2], [2]]


@given(
    st.integers(4, 20),
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(1, 16),
    st.integers(0, 16),
    st.sampled_from(["auto", 1, 2, 3, 5, {"ring": 2, "heads": 4}, {"ring": 3, "heads": 6}]),
)
def test_a_smaller_cluster_gives_the_best_smaller_mesh(
    log_context: int, micro_batches: int, micro: int, fewest: int, more: int, ring: Any
) -> None:
    spec = stage(2**log_context, micro_batches * micro, micro=micro, sequence_parallel=ring)
    resources = workers(fewest, fewest + more)
    try:
        wanted = resolve_mesh(spec, resources)
    except MeshError:
        assume(False)
    before = 0
    for available in range(wanted.world_size + 1):
        mesh = shrink_mesh(spec, resources, available)
        size = mesh.world_size if mesh else 0
        assert size >= before, "more workers, a smaller mesh"
        before = size
        if mesh is None:
            continue
        assert fewest <= size <= available
        assert spec.rows_per_step % (mesh.data_parallel_size * micro) == 0
        assert wanted.heads_size % mesh.heads_size == 0
        assert mesh.sequence_parallel_size <= wanted.sequence_parallel_size
        assert mesh.data_parallel_size <= wanted.data_parallel_size
        if available >= max(fewest, wanted.sequence_parallel_size) and fewest == 1:
            same = (wanted.ring_size, wanted.heads_size)
            assert (mesh.ring_size, mesh.heads_size) == same, "data_parallel gives way first"
    assert mesh == wanted
    sizes = [mesh.world_size for mesh in allowed_meshes(spec, resources)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == wanted.world_size and sizes[-1] >= fewest


DEFAULTS = """\
kind: train
name: job
data: {sources: {x: {shards: x}, y: {shards: y}}}
defaults:
  rope_theta: 1e6
  tokens: 64Ki
  global_batch_tokens: 8Ki
  learning_rate: {peak: 1e-3, warmup_steps: 2}
  mixture: {x: 1}
  mesh: {sequence_parallel: 1}
stages:
- {name: a, context_length: 1Ki}
- {name: b, context_length: 2Ki, learning_rate: {peak: 5e-4}, mixture: {y: 1}, steps: 3}
"""


def test_defaults_merge_key_by_key_but_for_the_mixture_and_the_length(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(DEFAULTS)
    a, b = load_job(tmp_path / "job.yaml", check_files=False).stages
    assert (a.learning_rate.peak, a.learning_rate.warmup_steps) == (1e-3, 2)
    assert (b.learning_rate.peak, b.learning_rate.warmup_steps) == (5e-4, 2)
    assert (a.mixture, b.mixture) == ({"x": 1.0}, {"y": 1.0})
    assert (a.steps, a.tokens, b.steps, b.tokens) == (None, 65536, 3, None)
    assert a.mesh == b.mesh
    assert (a.num_steps, b.num_steps) == (8, 3)
