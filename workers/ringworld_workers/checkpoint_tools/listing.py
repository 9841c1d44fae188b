"""What a run has in its store: committed checkpoints, and what never became one. No torch here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ringworld_workers.checkpoint.layout import (
    MANIFEST,
    SET_ASIDE,
    CheckpointError,
    CheckpointRef,
    Manifest,
    parse_folder,
)
from ringworld_workers.checkpoint_tools.parallel import in_parallel
from ringworld_workers.store.base import NotFound, ObjectInfo, Store

_READERS = 8
LeftoverKind = Literal["uncommitted", "damaged", "unreferenced", "unfinished"]


@dataclass(frozen=True)
class CheckpointEntry:
    """A committed checkpoint."""

    ref: CheckpointRef
    committed: float
    """When its manifest was written, in seconds since the epoch; 0 where the store cannot tell."""
    manifest: Manifest | None
    problem: str = ""
    """Why there is no manifest to show."""

    @property
    def size(self) -> int:
        """Bytes of its objects, as the manifest says."""
        return sum(stored.size for stored in self.manifest.objects) if self.manifest else 0


@dataclass(frozen=True)
class Leftover:
    """What lies in the store and is part of no committed checkpoint."""

    kind: LeftoverKind
    """``uncommitted``: objects without a manifest; ``damaged``: a checkpoint that was set aside;
    ``unreferenced``: objects beside those of a committed checkpoint; ``unfinished``: parts of an
    object that never was complete."""
    key: str
    """Folder in the store; of what is unfinished, as far as the store knows."""
    num_objects: int
    size: int | None
    """Bytes; None where the store does not tell."""
    modified: float
    """When the newest part of it was written, in seconds since the epoch."""


@dataclass(frozen=True)
class Listing:
    """All that a run has."""

    entries: tuple[CheckpointEntry, ...]
    """Oldest first."""
    leftovers: tuple[Leftover, ...]


def read_listing(store: Store, stage: str = "", step: int | None = None) -> Listing:
    """List a run's checkpoints, with what their manifests say.

    Args:
        store: the run's checkpoints.
        stage: only this one, by its name or its folder's; empty: all.
        step: only this one.

    Raises:
        StoreError: the store failed. A manifest that cannot be read is no error.
    """
    folders: dict[str, dict[str, ObjectInfo]] = defaultdict(dict)
    for info in store.list():
        folder, _, name = info.key.rpartition("/")
        place = parse_folder(folder)
        if place and _is_meant(place, folder, stage, step):
            folders[folder][name] = info
    refs = []
    for folder, held in folders.items():
        if MANIFEST in held and (place := parse_folder(folder)):
            refs.append(CheckpointRef(store.url, place[1], place[0], place[2], folder))
    refs.sort(key=lambda ref: (ref.stage_index, ref.step))

    def read(ref: CheckpointRef) -> CheckpointEntry | None:
        key = f"{ref.key}/{MANIFEST}"
        written = folders[ref.key][MANIFEST].modified
        try:
            return CheckpointEntry(ref, written, Manifest.from_json(store.get(key), key))
        except NotFound:  # removed since it was listed
            return None
        except CheckpointError as error:
            return CheckpointEntry(ref, written, None, str(error))

    entries = [entry for entry in in_parallel(read, refs, _READERS) if entry]
    leftovers = [*_leftovers(folders, entries), *_unfinished(store, stage, step)]
    return Listing(tuple(entries), tuple(leftovers))


def _is_meant(place: tuple[int, str, int], folder: str, stage: str, step: int | None) -> bool:
    names = ("", place[1], folder.partition("/")[0])
    return stage in names and (step is None or place[2] == step)


def _leftovers(
    folders: dict[str, dict[str, ObjectInfo]], entries: Iterable[CheckpointEntry]
) -> list[Leftover]:
    found = []
    by_folder = {entry.ref.key: entry for entry in entries}
    for folder, held in folders.items():
        if folder not in by_folder:
            kind: LeftoverKind = "damaged" if SET_ASIDE in held else "uncommitted"
            found.append(_leftover(kind, folder, list(held.values())))
            continue
        manifest = by_folder[folder].manifest
        if manifest is not None:
            known = {stored.key for stored in manifest.objects} | {f"{folder}/{MANIFEST}"}
            rest = [info for info in held.values() if info.key not in known]
            if rest:
                found.append(_leftover("unreferenced", folder, rest))
    return found


def _leftover(kind: LeftoverKind, folder: str, infos: list[ObjectInfo]) -> Leftover:
    size, newest = sum(info.size for info in infos), max(info.modified for info in infos)
    return Leftover(kind, folder, len(infos), size, newest)


def _unfinished(store: Store, stage: str, step: int | None) -> list[Leftover]:
    """Whole stores only: not every store knows of which object a part is."""
    if stage or step is not None:
        return []
    return [Leftover("unfinished", u.key, 1, None, u.started) for u in store.unfinished()]
