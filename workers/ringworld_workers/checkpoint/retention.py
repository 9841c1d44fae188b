"""Which checkpoints go, and what interrupted saves have left behind. No torch here."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ringworld_workers.checkpoint.catalog import refs_in
from ringworld_workers.checkpoint.fence import WRITER
from ringworld_workers.checkpoint.layout import (
    MANIFEST,
    SET_ASIDE,
    CheckpointError,
    CheckpointRef,
    Manifest,
    parse_folder,
)
from ringworld_workers.checkpoint.save_id import SaveId
from ringworld_workers.store.base import ObjectInfo, Store

_ALWAYS_KEPT = 2
_COMMIT_SECONDS = 600.0
"""A manifest that a gang began to write while it was still the one that writes may arrive so much
later: a store tries again for minutes."""

Kind = Literal["checkpoint", "uncommitted", "set aside", "unreferenced", "unfinished"]


@dataclass(frozen=True)
class Removable:
    """Something in a run's place that may go, or has gone."""

    kind: Kind
    """checkpoint: a committed one; uncommitted: a folder without a manifest; set aside: one whose
    manifest was found damaged; unreferenced: an object that its folder's manifest does not name;
    unfinished: what an interrupted upload has left, which no listing shows."""
    key: str
    """Of the folder or object; what the store calls an unfinished upload."""
    num_bytes: int
    """0 of an unfinished upload: stores do not tell."""
    modified: float
    """When it was last written, by the store's clock, in seconds since the epoch."""
    keys: tuple[str, ...] = ()
    """Objects, in the order in which they go."""


def leftovers(store: Store) -> list[Removable]:
    """All that is in a run's place and in no checkpoint, oldest first.

    A gang that is saving just now leaves as much until it commits.

    Raises:
        StoreError: the store failed.
    """
    folders = _by_folder(store.list())
    return sorted(_leftovers(store, folders), key=lambda left: left.modified)


def prune(
    store: Store,
    keep: int,
    keep_stage_ends: bool,
    *,
    unfinished_seconds: float = 86400.0,
    last: SaveId | None = None,
    dry_run: bool = False,
) -> list[Removable]:
    """Remove old checkpoints and what interrupted saves left.

    Kept are the newest ``keep`` of the run, at least two, and with ``keep_stage_ends`` the last of
    every stage. Of a checkpoint the manifest goes first: a clean-up that is cut short leaves none
    that lacks a part. Leftovers go once they are ``unfinished_seconds`` old; and at once, where
    no one can be writing them any more and they are older than the newest checkpoint: what was
    last written before the present gang took ``writer.json``, minutes ago, and what saves up to
    ``last`` left.

    Args:
        store: of the run; its root holds ``writer.json``.
        keep: at least 1.
        keep_stage_ends: whether the last checkpoint of every stage stays for ever.
        unfinished_seconds: age at which a leftover goes, whoever wrote it.
        last: the newest save that the calling gang has committed.
        dry_run: remove nothing.

    Returns:
        What went, or would go.

    Raises:
        StoreError: the store failed; what has gone by then stays gone.
    """
    infos = store.list()
    folders, refs = _by_folder(infos), refs_in(store.url, infos)
    kept = _kept(refs, keep, keep_stage_ends)
    going = [_whole(folders[ref.key]) for ref in refs if ref.key not in kept]
    dead_before = _dead_before(infos)
    newest_place = (refs[-1].stage_index, refs[-1].step) if refs else (-1, -1)
    latest = time.time() - unfinished_seconds
    for left in _leftovers(store, folders):
        if left.kind == "unfinished":
            # No one will commit what was begun before the gang that now writes took over.
            dead = left.modified < dead_before
        elif left.kind == "set aside":
            dead = False
        else:
            dead = _is_overtaken(left, newest_place) and _is_idle(left, folders, dead_before, last)
        if dead or left.modified < latest:
            going.append(left)
    if not dry_run:
        for removable in going:
            for key in removable.keys:
                store.delete(key)
        if any(removable.kind == "unfinished" for removable in going):
            store.remove_unfinished("", time.time() - max(dead_before, latest))
    return going


def _dead_before(infos: list[ObjectInfo]) -> float:
    """What was last written before then is of a gang that will commit nothing more.

    That is when the gang that writes took over; 0 as long as a commit of the one before may still
    be on its way. All by the store's clock.
    """
    taken = next((info.modified for info in infos if info.key == WRITER), 0.0)
    now = max((info.modified for info in infos), default=0.0)
    return taken if now - taken > _COMMIT_SECONDS else 0.0


def _kept(refs: list[CheckpointRef], keep: int, keep_stage_ends: bool) -> set[str]:
    """Folders of the committed checkpoints, oldest first, that stay."""
    kept = {ref.key for ref in refs[-max(keep, _ALWAYS_KEPT) :]}
    if keep_stage_ends:
        kept |= {ref.key for ref in {ref.stage_index: ref for ref in refs}.values()}
    return kept


def _by_folder(infos: Iterable[ObjectInfo]) -> dict[str, list[ObjectInfo]]:
    """Objects by the checkpoint's folder that they lie in."""
    folders = defaultdict(list)
    for info in infos:
        if parse_folder(_folder(info)):
            folders[_folder(info)].append(info)
    return folders


def _whole(infos: list[ObjectInfo]) -> Removable:
    """A committed checkpoint: its manifest, then all that was there when that was written.

    What came later may be another gang's, on its way to replace it.
    """
    (manifest,) = (info for info in infos if _name(info) == MANIFEST)
    parts = [i for i in infos if i is not manifest and i.modified <= manifest.modified]
    return _removable("checkpoint", _folder(manifest), [manifest, *parts])


def _leftovers(store: Store, folders: dict[str, list[ObjectInfo]]) -> list[Removable]:
    found: list[Removable] = []
    for folder, infos in folders.items():
        names = {_name(info) for info in infos}
        if MANIFEST in names:
            referenced = _referenced(store, folder)
            if referenced is not None:
                spare = [info for info in infos if info.key not in referenced]
                found += [_removable("unreferenced", info.key, [info]) for info in spare]
        else:
            kind: Kind = "set aside" if SET_ASIDE in names else "uncommitted"
            found.append(_removable(kind, folder, infos))
    for left in store.unfinished():
        found.append(Removable("unfinished", left.handle, 0, left.started))
    return found


def _referenced(store: Store, folder: str) -> set[str] | None:
    """What belongs to a checkpoint; None where its manifest does not tell."""
    key = f"{folder}/{MANIFEST}"
    try:
        manifest = Manifest.from_json(store.get(key), key)
    except CheckpointError:
        return None
    return {key, *(stored.key for stored in manifest.objects)}


def _removable(kind: Kind, key: str, infos: list[ObjectInfo]) -> Removable:
    return Removable(
        kind,
        key,
        sum(info.size for info in infos),
        max(info.modified for info in infos),
        tuple(info.key for info in infos),
    )


def _is_overtaken(left: Removable, newest: tuple[int, int]) -> bool:
    """Whether there is a committed checkpoint as new, or newer."""
    places = [parse_folder(key.rpartition("/")[0]) for key in left.keys]
    return bool(places) and all(place and (place[0], place[2]) <= newest for place in places)


def _is_idle(
    left: Removable, folders: dict[str, list[ObjectInfo]], dead_before: float, last: SaveId | None
) -> bool:
    """Whether no gang can be writing any of it."""
    folder = left.keys[0].rpartition("/")[0]
    infos = [info for info in folders[folder] if info.key in left.keys]
    return all(info.modified < dead_before or _is_done(info.key, last) for info in infos)


def _is_done(key: str, last: SaveId | None) -> bool:
    """Whether the object is of the calling gang's last committed save, or of one before that."""
    found = SaveId.of(key)
    return found is not None and last is not None and (
        found.token == last.token and found.number <= last.number
    )  # fmt: skip


def _name(info: ObjectInfo) -> str:
    return info.key.rpartition("/")[2]


def _folder(info: ObjectInfo) -> str:
    return info.key.rpartition("/")[0]
