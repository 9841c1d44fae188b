"""What a stage runs on, and the job that each of its ranks is handed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ringworld_jobs.any_job import Job
from ringworld_jobs.mesh import MeshError, MeshSize, resolve_mesh
from ringworld_jobs.spec import JobSpec
from ringworld_model.config import ModelConfig
from ringworld_platform.capacity import has_gpus
from ringworld_platform.errors import PlatformError
from ringworld_platform.live_run import LiveRun
from ringworld_platform.proofs import is_proved
from ringworld_platform.run_claims import checkpoints_url
from ringworld_workers.stage_job import StageJob


def mesh_of(spec: JobSpec, index: int) -> MeshSize:
    """The size of each axis of a stage's mesh.

    Raises:
        PlatformError: the job's workers cannot form it.
    """
    try:
        return resolve_mesh(spec.stages[index], spec.resources)
    except MeshError as error:
        raise PlatformError(f"stages[{index}].{error.field}: {error}") from error


def device_of(spec: Job) -> Literal["cpu", "cuda"]:
    """What the workers compute on: as asked, or a GPU where the cluster has any."""
    asked = spec.resources.accelerator
    return "cuda" if asked == "gpu" or (asked == "auto" and has_gpus()) else "cpu"


def stage_job(
    live: LiveRun, spec: JobSpec, index: int, mesh: MeshSize, device: Literal["cpu", "cuda"]
) -> StageJob:
    """The job of a stage's ranks, for the attempt that the run is at.

    Raises:
        PlatformError: the model's shape does not go with the prepared data, or a source is of a
            dataset that the recipe no longer has.
    """
    record = live.record
    prepared = record.prepared or {}
    return StageJob(
        run_id=record.run_id,
        spec=spec,
        stage_index=index,
        attempt=record.attempt,
        world_size=mesh.world_size,
        sequence_parallel_size=mesh.sequence_parallel_size,
        heads_size=mesh.heads_size,
        data_parallel_size=mesh.data_parallel_size,
        device=device,
        data_dir=str(prepared.get("dir", "")),
        sources=sources_of(spec, prepared.get("datasets", {})),
        model_config=_model_config(spec, prepared),
        checkpoint_url=checkpoints_url(spec, record.run_id),
        spec_digest=record.spec_digest,
        run_uid=record.uid,
        take_older=record.take_older,
        skip_steps=tuple(record.left_out.get(index, ())),
        proved=is_proved(
            live.folder.path,
            spec.stages[index].name,
            {
                "ring_size": mesh.ring_size,
                "heads_size": mesh.heads_size,
                "data_parallel_size": mesh.data_parallel_size,
                "device": device,
            },
        ),
    )


def sources_of(spec: Job, prepared: Mapping[str, str]) -> dict[str, str]:
    """Folder or URL of every source.

    Args:
        spec: the job.
        prepared: folder of each of the recipe's datasets.

    Raises:
        PlatformError: a source is of a dataset that is not among them.
    """
    try:
        return spec.data.places(prepared)
    except KeyError as error:
        raise PlatformError(
            f"data.sources: the recipe has no dataset {error} any more (it has "
            f"{', '.join(sorted(prepared)) or 'none'}); put it back, or submit the job anew"
        ) from None


def _model_config(spec: JobSpec, prepared: Mapping[str, Any]) -> ModelConfig:
    try:
        return spec.model.config(
            text_vocab_size=prepared.get("tokenizer_size"),
            codebook_size=prepared.get("codebook_size"),
        )
    except (KeyError, ValueError) as error:
        raise PlatformError(f"model: {error}") from error


def heads_apart(mesh: MeshSize, nodes: Sequence[str]) -> str | None:
    """What to say where workers that split heads are on several nodes; that is right, but slow.

    Args:
        mesh: the stage's mesh.
        nodes: the node of each rank, in order.

    Returns:
        A sentence; None where each group is on one node.
    """
    size = mesh.heads_size
    places = [nodes[first : first + size] for first in range(0, len(nodes), size)]
    apart = sum(len(set(place)) > 1 for place in places)
    if not apart:
        return None
    return (
        f"{apart} of {len(places)} groups of {size} workers that split the heads lie on several "
        "nodes, and their exchange is the mesh's heaviest; make mesh.sequence_parallel.heads a "
        "divisor of the workers of a node"
    )
