"""Which checkpoints a run has. No torch here."""

from __future__ import annotations

from collections.abc import Iterable

from ringworld_workers.checkpoint.layout import MANIFEST, CheckpointRef, parse_folder
from ringworld_workers.store.base import ObjectInfo, Store


def committed(store: Store) -> list[CheckpointRef]:
    """All committed checkpoints of the run, oldest first: by stage, then by step."""
    return refs_in(store.url, store.list())


def newest(store: Store) -> CheckpointRef | None:
    """The committed checkpoint to resume from: of the highest stage the highest step."""
    return next(reversed(committed(store)), None)


def refs_in(url: str, infos: Iterable[ObjectInfo]) -> list[CheckpointRef]:
    """The committed checkpoints in a listing of a run's store, oldest first."""
    refs = []
    for info in infos:
        folder, _, name = info.key.rpartition("/")
        place = parse_folder(folder)
        if name == MANIFEST and place:
            stage_index, stage, step = place
            refs.append(CheckpointRef(url, stage, stage_index, step, folder))
    return sorted(refs, key=lambda ref: (ref.stage_index, ref.step))
