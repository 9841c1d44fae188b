"""Choose among a run's committed checkpoints by stage and step. No torch here."""

from __future__ import annotations

import difflib

from ringworld_workers.checkpoint.catalog import committed
from ringworld_workers.checkpoint.layout import MANIFEST, CheckpointError, CheckpointRef, Manifest
from ringworld_workers.store.base import NotFound, Store

_MAX_NAMED = 12


class NoSuchCheckpoint(CheckpointError):
    """The run has none, or none of that stage or step; the message says which there are."""


def choose(store: Store, stage: str = "", step: int | None = None) -> list[CheckpointRef]:
    """The committed checkpoints of a run, of a stage, or that of one step, oldest first.

    Args:
        store: the run's checkpoints.
        stage: name of a stage, with or without the number that its folder has; empty: all.
        step: of that stage.

    Returns:
        At least one.

    Raises:
        NoSuchCheckpoint: there is none; says which there are.
        StoreError: the store failed.
    """
    refs = committed(store)
    if not refs:
        raise NoSuchCheckpoint(f"{store.url} holds no committed checkpoint")
    if not stage:
        return refs
    of_stage = [ref for ref in refs if stage in (ref.stage, stage_folder(ref.key))]
    if not of_stage:
        there = list(dict.fromkeys(ref.stage for ref in refs))
        raise NoSuchCheckpoint(
            f"stage {stage!r} has no committed checkpoint in {store.url}; there are "
            f"{', '.join(there)}{_hint(stage, there)}"
        )
    found = [ref for ref in of_stage if step is None or ref.step == step]
    if not found:
        steps = [str(ref.step) for ref in of_stage]
        shown = ", ".join(steps if len(steps) <= _MAX_NAMED else ["...", *steps[-_MAX_NAMED:]])
        raise NoSuchCheckpoint(
            f"step {step} of stage {of_stage[0].stage} has no committed checkpoint in "
            f"{store.url}; there are {shown}"
        )
    return found


def choose_newest(store: Store, stage: str = "", step: int | None = None) -> CheckpointRef:
    """The newest of what ``choose`` finds; raises as it does."""
    return choose(store, stage, step)[-1]


def manifest_of(store: Store, ref: CheckpointRef) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        NoSuchCheckpoint: it has none any more.
        DamagedCheckpoint: it cannot be read.
        StoreError: the store failed.
    """
    key = f"{ref.key}/{MANIFEST}"
    try:
        return Manifest.from_json(store.get(key), key)
    except NotFound:
        raise NoSuchCheckpoint(f"{store.url}/{key} is not there: it was removed") from None


def stage_folder(key: str) -> str:
    """Of a checkpoint's folder the stage's, such as ``01-8k``."""
    return key.partition("/")[0]


def _hint(name: str, there: list[str]) -> str:
    near = difflib.get_close_matches(name, there, n=1)
    return f"; did you mean {near[0]}?" if near and len(there) > 1 else ""
