"""The weights that a run begins with: drawn from its seed, or those of `model.init_from`."""

from __future__ import annotations

import logging

from ringworld_jobs.weights import parse_init_from
from ringworld_model.hf import LoadedWeights, load_pretrained
from ringworld_model.lwm import load_lwm
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_workers.checkpoint.catalog import newest
from ringworld_workers.checkpoint.together import from_rank_0
from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store

log = logging.getLogger(__name__)


def set_initial_weights(model: WorldModel, job: StageJob, mesh: Mesh, reporter: Reporter) -> bool:
    """Give a new model the weights that its run begins with. A collective of the gang.

    Where a checkpoint will give the weights, of this run or of another, nothing is drawn or read:
    the model keeps what its memory held. Every rank reads a source for itself, each tensor once.

    Args:
        model: whole, before an engine shards it; its weights are the fp32 masters.
        job: names the source.
        mesh: this rank's place.
        reporter: on rank 0 it takes the event that says what was loaded, and what was drawn.

    Returns:
        Whether the model has its weights; else ``restoring.restore`` must load them.

    Raises:
        WeightsError: the source is not of this model, or cannot be read on this node.
        StoreError: the store of checkpoints cannot be read.
    """
    init_from = job.spec.model.init_from
    if _has_begun(job, mesh):
        return False
    if init_from is None:
        init_weights(model, job.spec.seed)
        return True
    if parse_init_from(init_from).kind == "run":
        return False
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
    return True


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
    if job.stage_index > 0:
        return True
    return bool(from_rank_0(lambda: newest(open_store(job.checkpoint_url)) is not None, mesh))
