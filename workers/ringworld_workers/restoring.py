"""From which checkpoint a stage starts."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.checkpoint.layout import (
    MANIFEST,
    SET_ASIDE,
    CheckpointError,
    CheckpointRef,
    DamagedCheckpoint,
    TrainState,
)
from ringworld_workers.checkpoint.reader import Owner, load
from ringworld_workers.checkpoint.together import from_rank_0
from ringworld_workers.engine.base import Engine
from ringworld_workers.mesh import Mesh
from ringworld_workers.reporter import Reporter
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.base import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a stage begins: its first step to run, and the checkpoint that it comes from."""

    step: int
    tokens: int
    key: str | None
    """None where the run begins: the engine has no weights yet."""
    bookmark: Any = None
    """Of the row plan, see ``StageLoader.open_at``."""
    resumed: bool = False
    """Whether the checkpoint is of this stage, rather than the end of the one before."""


def restore(job: StageJob, store: Store, engine: Engine, mesh: Mesh, reporter: Reporter) -> Start:
    """Load the newest committed checkpoint of this stage, else the end of the stage before.

    A first stage that has neither begins anew: nothing is loaded, see ``set_initial_weights``. A
    damaged checkpoint is set aside for the next older one, if the job allows it. A collective of
    the gang.

    Args:
        job: the stage.
        store: of the run's checkpoints.
        engine: gets the state.
        mesh: of the engine.
        reporter: is told while values arrive, and on rank 0 of each checkpoint that was set aside.

    Raises:
        DamagedCheckpoint: what is there is damaged, and no older one may be taken, or there is
            none.
        CheckpointError: the stage before left no final checkpoint; what is there is of a later
            stage, of another model or batch size.
        StoreError: the store does not answer.
    """
    found = from_rank_0(lambda: [asdict(ref) for ref in _candidates(job, store)], mesh)
    refs = [CheckpointRef(**fields) for fields in found]
    if not refs:
        return Start(step=0, tokens=0, key=None)
    for ref, older in zip(refs, [*refs[1:], None], strict=True):
        try:
            return _start_at(ref, job, store, engine, mesh, reporter)
        except DamagedCheckpoint as error:
            if older is None:
                raise DamagedCheckpoint(
                    f"{error}; there is no older checkpoint that stage {job.stage.name} could "
                    "start from; start a new run"
                ) from error
            if not (job.take_older or job.spec.checkpoint.when_damaged == "older"):
                raise DamagedCheckpoint(
                    f"{error}; the next older checkpoint is {older.key}: take it by `ringworld "
                    f"resume {job.run_id} --older`, or always by checkpoint.when_damaged: older"
                ) from error
            damage = str(error)
        _set_aside(ref, older, damage, store, mesh, job, reporter)
    raise AssertionError  # the last of them has returned or raised


def _candidates(job: StageJob, store: Store) -> Sequence[CheckpointRef]:
    """What the stage may start from, the best first; nothing where it is the run's beginning.

    Raises:
        CheckpointError: there is something, or there should be, but nothing to start from.
    """
    refs = committed(store)
    index, stage = job.stage_index, job.stage.name
    if refs and refs[-1].stage_index > index:
        raise CheckpointError(
            f"{refs[-1].key} is of a later stage than {stage}; continue with that stage, or start "
            "a new run"
        )
    own = [ref for ref in refs if ref.stage_index == index]
    before = [ref for ref in refs if ref.stage_index == index - 1]
    if index > 0 and not own and not before:
        raise CheckpointError(
            f"stage {stage} starts from the end of stage {job.spec.stages[index - 1].name}, but "
            f"{store.url} holds no committed checkpoint of it"
        )
    return [*reversed(own), *before[-1:]]


def _start_at(
    ref: CheckpointRef,
    job: StageJob,
    store: Store,
    engine: Engine,
    mesh: Mesh,
    reporter: Reporter,
) -> Start:
    """Load one of the run's own checkpoints."""
    resumed = ref.stage_index == job.stage_index
    state = load(
        store,
        ref,
        engine,
        mesh,
        with_optimizer=resumed or job.stage.optimizer_state == "inherit",
        owner=Owner(job.run_id, job.run_uid),
        beat=lambda: reporter.phase("load", 0),
    )
    if not resumed:
        if not state.final:
            raise CheckpointError(
                f"{ref.key} is not the end of its stage, so stage {job.stage.name} cannot start "
                "from it"
            )
        return Start(step=0, tokens=state.tokens, key=ref.key)
    expected = state.step * job.stage.rows_per_step
    if state.cursor != expected:
        raise CheckpointError(
            f"{ref.key} continues at row {state.cursor}, but with the stage's "
            f"{job.stage.rows_per_step} rows a step its step {state.step} would continue at row "
            f"{expected}; give global_batch_tokens and context_length their old values"
        )
    _restore_rng(state, ref)
    return Start(state.step, state.tokens, ref.key, state.bookmark, resumed=True)


def _set_aside(
    ref: CheckpointRef,
    older: CheckpointRef,
    damage: str,
    store: Store,
    mesh: Mesh,
    job: StageJob,
    reporter: Reporter,
) -> None:
    """Make a damaged checkpoint one that was never committed; a later save of its step may be."""

    def rename() -> None:
        # Copied before it is deleted: its bytes tell what was wrong.
        store.put(f"{ref.key}/{SET_ASIDE}", [store.get(f"{ref.key}/{MANIFEST}")])
        store.delete(f"{ref.key}/{MANIFEST}")

    from_rank_0(rename, mesh)
    text = f"stage {job.stage.name}: {damage}; it is set aside, and {older.key} is tried"
    log.warning("%s", text)
    if mesh.rank == 0:
        reporter.event(
            {
                "kind": "damaged_checkpoint",
                "text": text,
                "checkpoint": ref.key,
                "reason": damage,
                "older": older.key,
            }
        )


def _restore_rng(state: TrainState, ref: CheckpointRef) -> None:
    if not state.rng:
        return
    try:
        held = bytearray(base64.b64decode(state.rng, validate=True))
        torch.set_rng_state(torch.frombuffer(held, dtype=torch.uint8))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DamagedCheckpoint(
            f"{ref.key}/{MANIFEST} is damaged: state.rng is no state of torch's generator ({error})"
        ) from error
