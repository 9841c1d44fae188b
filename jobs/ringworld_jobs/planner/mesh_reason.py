"""Why a stage runs on its mesh, in a sentence. The choice itself is ``mesh.resolve_mesh``."""

from __future__ import annotations

from ringworld_jobs.mesh import LOCAL_TOKENS, MeshSize
from ringworld_jobs.spec import ResourcesSpec, StageSpec
from ringworld_jobs.units import format_tokens


def mesh_reason(
    stage: StageSpec, resources: ResourcesSpec, wanted: MeshSize, mesh: MeshSize, there: int
) -> str:
    """Say where each axis comes from.

    Args:
        stage: its spec.
        resources: the job's.
        wanted: what ``resolve_mesh`` gives.
        mesh: what it runs on, with the workers that there are.
        there: workers that there are.
    """
    if mesh != wanted:
        return (
            f"{wanted} is wanted, {wanted.world_size} workers, and there are {there}: the rings "
            "give way first, then their places; more micro-batches make up for it"
        )
    return f"{_ring(stage, resources, mesh)}; {_rings(stage, resources, mesh)}"


def _ring(stage: StageSpec, resources: ResourcesSpec, mesh: MeshSize) -> str:
    local = -(-stage.context_length // mesh.sequence_parallel_size)
    each = f"{format_tokens(local)} tokens of a row on each worker"
    if stage.mesh.sequence_parallel != "auto":
        return f"{each}, as mesh.sequence_parallel says"
    if local > LOCAL_TOKENS:
        all_there = f"for a ring of all {mesh.sequence_parallel_size} workers"
        return f"{each}, {all_there} is not enough for {format_tokens(LOCAL_TOKENS)}"
    wanted = max(1, -(-stage.context_length // LOCAL_TOKENS))
    if mesh.ring_size > wanted:
        return f"{each}: the ring grows until resources.workers.min {resources.workers.min} is met"
    return f"{each}, at most {format_tokens(LOCAL_TOKENS)}"


def _rings(stage: StageSpec, resources: ResourcesSpec, mesh: MeshSize) -> str:
    rings, rows = mesh.data_parallel_size, stage.rows_per_step
    turns = rows // (rings * stage.micro_batch_size)
    share = f"{rings} ring{'s' * (rings > 1)} for the {rows} row{'s' * (rows > 1)} of a step"
    turn = f"{turns} micro-batch{'es' * (turns > 1)} each"
    if stage.mesh.data_parallel != "auto":
        return f"{share}, as mesh.data_parallel says, {turn}"
    limit = resources.workers.max // mesh.sequence_parallel_size
    why = f"all that {resources.workers.max} workers hold" if rings == limit else "no more divide"
    return f"{share}, {why}, {turn}" if rows > 1 else f"{share}, {turn}"
