"""The weights that a run begins with: drawn from its seed, or those of `model.init_from`."""

from __future__ import annotations

import logging

import torch.distributed as dist

from ringworld_jobs.weights import parse_init_from
from ringworld_model.hf import LoadedWeights, load_pretrained
from ringworld_model.lwm import load_lwm
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_workers.checkpoint.catalog import newest
from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store

log = logging.getLogger(__name__)


def set_initial_weights(model: WorldModel, job: StageJob, mesh: Mesh, reporter: Reporter) -> None:
    """Give a new model the weights that its run begins with. A collective of the gang.

    A run that has a checkpoint goes on from that, and its source is not opened again: it may be
    gone. Every rank reads the source for itself, each tensor once.

    Args:
        model: whole, before an engine shards it; its weights are the fp32 masters.
        job: names the source.
        mesh: this rank's place.
        reporter: on rank 0 it takes the event that says what was loaded, and what was drawn.

    Raises:
        WeightsError: the source is not of this model, or cannot be read on this node.
        StoreError: the store of checkpoints cannot be read.
    """
    init_from = job.spec.model.init_from
    if init_from is None or _has_begun(job, mesh):
        init_weights(model, job.spec.seed)
        return
    reporter.phase("load", 0)
    loaded = load_source(model, init_from, job.spec.seed)
    log.info("%s", loaded)
    if mesh.rank == 0:
        reporter.event(
            {
                "kind": "weights",
                "text": f"stage {job.stage.name}: {loaded}",
                "init_from": init_from,
                "drawn": list(loaded.drawn),
                "left": list(loaded.left),
            }
        )


def load_source(model: WorldModel, init_from: str, seed: int) -> LoadedWeights:
    """Fill a model from ``hf:FOLDER`` or ``lwm:FILE``.

    Args:
        model: with whole parameters.
        init_from: with an absolute path, as a loaded job has it.
        seed: of what the source does not have.

    Raises:
        WeightsError: the source is not of this model, or cannot be read.
    """
    source = parse_init_from(init_from)
    load = load_pretrained if source.kind == "hf" else load_lwm
    return load(model, source.path, seed=seed)


def _has_begun(job: StageJob, mesh: Mesh) -> bool:
    """Whether the run has a checkpoint; rank 0 looks, so that all ranks see the same."""
    found = [mesh.rank == 0 and newest(open_store(job.checkpoint_url)) is not None]
    dist.broadcast_object_list(found, src=0, group=mesh.control_group)
    return job.stage_index > 0 or found[0]
