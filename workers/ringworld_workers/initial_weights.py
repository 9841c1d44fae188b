"""The weights that a run begins with: drawn from its seed, or those of `model.init_from`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ringworld_jobs.run_place import CheckpointPlace
from ringworld_jobs.weights import parse_init_from
from ringworld_model.config import ModelConfig
from ringworld_model.hf import LoadedWeights, NamedTensors, WeightsError, read_pretrained
from ringworld_model.lwm import read_lwm
from ringworld_model.transformer import draw_weight
from ringworld_workers.checkpoint.exchange import all_gather_json
from ringworld_workers.checkpoint.layout import CheckpointRef
from ringworld_workers.checkpoint.reader import load
from ringworld_workers.engine.base import Engine
from ringworld_workers.engine.weights import copy_weights
from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.opening import open_store

log = logging.getLogger(__name__)

T = TypeVar("T")


def set_initial_weights(engine: Engine, job: StageJob, mesh: Mesh, reporter: Reporter) -> None:
    """Give an engine the weights that its run begins with. A collective of the gang.

    For a run that has no checkpoint: one that has goes on from that, and its source may be gone.
    Every rank draws or reads one tensor after another, and keeps its share of each.

    Args:
        engine: around a ``WorldModel``.
        job: names the source.
        mesh: this rank's place.
        reporter: sees each tensor as progress; on rank 0 it takes the event that says what was
            loaded, and what was drawn.

    Raises:
        WeightsError: the source is not of this model, or cannot be read on one of the nodes.
        CheckpointError, StoreError: the checkpoint of another run cannot be loaded.
    """
    init_from = job.spec.model.init_from
    if init_from is None:
        _fill(engine, _drawn(engine, job), mesh, reporter)
        return
    source = parse_init_from(init_from)
    if source.kind == "run":
        text, drawn, left = _load_checkpoint(engine, source.checkpoint, job, mesh, reporter)
    else:
        loaded, tensors = _together(
            partial(open_source, job.model_config, init_from, job.spec.seed), mesh
        )
        _fill(engine, tensors, mesh, reporter)
        text, drawn, left = str(loaded), loaded.drawn, loaded.left
    log.info("%s", text)
    if mesh.rank == 0:
        reporter.event(
            {
                "kind": "weights",
                "text": f"stage {job.stage.name}: {text}",
                "init_from": init_from,
                "drawn": list(drawn),
                "left": list(left),
            }
        )


def open_source(
    config: ModelConfig, init_from: str, seed: int
) -> tuple[LoadedWeights, NamedTensors]:
    """Open ``hf:FOLDER`` or ``lwm:FILE``, to be read one tensor at a time.

    Args:
        config: of the model that the weights are for.
        init_from: with an absolute path, as a loaded job has it.
        seed: of what the source does not have.

    Returns:
        What is in it, and every parameter of the model with its name, whole, on the CPU.

    Raises:
        WeightsError: the source is not of this model, or cannot be read.
    """
    source = parse_init_from(init_from)
    read = read_pretrained if source.kind == "hf" else read_lwm
    return read(config, source.path, seed=seed)


def _drawn(engine: Engine, job: StageJob) -> NamedTensors:
    for name, shape in engine.parameter_shapes().items():
        yield name, draw_weight(name, shape, job.model_config, job.spec.seed)


def _fill(engine: Engine, tensors: NamedTensors, mesh: Mesh, reporter: Reporter) -> None:
    def told() -> NamedTensors:
        for name, tensor in tensors:
            reporter.phase("load", 0)  # a large model takes minutes, and is no stall
            yield name, tensor
            del tensor  # before the next one is made

    engine.load_ranges(lambda ranges: _together(partial(copy_weights, told(), ranges), mesh), None)


def _load_checkpoint(
    engine: Engine, place: CheckpointPlace | None, job: StageJob, mesh: Mesh, reporter: Reporter
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Load the weights, and if the stage inherits them the moments, of another run.

    Returns:
        What was loaded, in words; what was drawn; what was left out.
    """
    if place is None:
        raise WeightsError(
            f"model.init_from={job.spec.model.init_from} is not settled on one checkpoint; submit "
            "the job, which does that"
        )
    store = open_store(place.checkpoints_url)
    ref = CheckpointRef(store.url, place.stage, place.stage_index, place.step, place.key)
    inherits = job.stage.optimizer_state == "inherit"
    state = load(
        store,
        ref,
        engine,
        mesh,
        with_optimizer=inherits,
        own_groups=True,
        beat=lambda: reporter.phase("load", 0),
    )
    held = "weights and optimizer state" if inherits else "weights"
    text = f"{held} from run:{place}, after {state.tokens} tokens"
    return text, (), () if inherits else ("optimizer state",)


def _together(action: Callable[[], T], mesh: Mesh) -> T:
    """What ``action`` returns on this rank, once it has succeeded on all ranks. A collective.

    Raises:
        WeightsError: it failed on some rank. The others would wait for that one for ever.
    """
    value, failure = None, None
    try:
        value = action()
    except (WeightsError, OSError) as error:
        failure = error if isinstance(error, WeightsError) else WeightsError(str(error))
    for rank, told in enumerate(all_gather_json(str(failure) if failure else None, mesh)):
        if told is not None:
            raise failure or WeightsError(f"rank {rank}: {told}")
    return value  # type: ignore[return-value]  # no failure, so it is what action returned
