"""Which checkpoints a run has, and which of them may go. No torch here."""

from __future__ import annotations

from ringworld_workers.checkpoint.layout import MANIFEST, CheckpointRef, parse_folder
from ringworld_workers.store.base import Store

_ALWAYS_KEPT = 2


def committed(store: Store) -> list[CheckpointRef]:
    """All committed checkpoints of the run, oldest first: by stage, then by step."""
    refs = []
    for info in store.list():
        folder, _, name = info.key.rpartition("/")
        place = parse_folder(folder)
        if name == MANIFEST and place:
            stage_index, stage, step = place
            refs.append(CheckpointRef(store.url, stage, stage_index, step, folder))
    return sorted(refs, key=lambda ref: (ref.stage_index, ref.step))


def newest(store: Store) -> CheckpointRef | None:
    """The committed checkpoint to resume from: of the highest stage the highest step."""
    return next(reversed(committed(store)), None)


def prune(store: Store, keep: int) -> list[str]:
    """Remove old checkpoints and what interrupted saves left; one rank calls it.

    Kept are the newest ``keep`` of each stage, so at least each stage's last, and the newest two
    of the run whatever ``keep`` says. A manifest goes first: a clean-up that is cut short leaves
    no checkpoint that lacks a part.

    Args:
        store: of the run.
        keep: at least 1.

    Returns:
        Keys of the folders removed.
    """
    refs = committed(store)
    if not refs:
        return []
    kept = {ref.key for ref in refs[-_ALWAYS_KEPT:]}
    for stage_index in {ref.stage_index for ref in refs}:
        of_stage = [ref.key for ref in refs if ref.stage_index == stage_index]
        kept |= set(of_stage[-max(1, keep) :])
    removed = []
    for ref in refs:
        if ref.key not in kept:
            store.delete(f"{ref.key}/{MANIFEST}")
            store.delete_prefix(ref.key)
            removed.append(ref.key)
    return removed + _remove_uncommitted(store, refs)


def unreferenced(store: Store, folder: str, referenced: set[str]) -> list[str]:
    """Keys of what interrupted saves of a committed step left beside its objects."""
    keys = (info.key for info in store.list(folder))
    return [key for key in keys if key not in referenced and key != f"{folder}/{MANIFEST}"]


def _remove_uncommitted(store: Store, refs: list[CheckpointRef]) -> list[str]:
    """Folders without a manifest that are older than the newest checkpoint: no one will finish
    them. Newer ones may be on their way.
    """
    newest_place = (refs[-1].stage_index, refs[-1].step)
    known = {ref.key for ref in refs}
    leftovers = set()
    for info in store.list():
        folder = info.key.rpartition("/")[0]
        place = parse_folder(folder)
        if place and folder not in known and (place[0], place[2]) < newest_place:
            leftovers.add(folder)
    for folder in leftovers:
        store.delete_prefix(folder)
    return sorted(leftovers)
