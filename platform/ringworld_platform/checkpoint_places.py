"""Which checkpoints a person means: a run's name, a url or a path, with a stage and step behind."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ringworld_platform.errors import UnknownRunError
from ringworld_platform.run_records import CHECKPOINTS_FOLDER

if TYPE_CHECKING:
    from ringworld_workers.store.base import Store

_MANIFEST = "manifest.json"
_MAX_NAMED = 8
_STAGE_FOLDER = re.compile(r"\d{2,}-.+")
_STEP = re.compile(r"(?:step-)?(\d{1,18})")
FORMS = (
    "write RUN, RUN/STAGE or RUN/STAGE/STEP, where RUN is a run's id, a job's name (its newest "
    "run), a path, or a url such as s3://BUCKET/PREFIX/RUN"
)


@dataclass(frozen=True, slots=True)
class Place:
    """A run's checkpoints, or some of them. Whether there are any is not known yet.

    Attributes:
        run_url: folder or prefix of the run.
        url: root of its checkpoints, which ``open_store`` takes.
        stage: only those of this stage, by its name or its folder's; empty: of all stages.
        step: only that of this step.
        folder: of the run's records, where they are on this machine.
    """

    run_url: str
    url: str
    stage: str = ""
    step: int | None = None
    folder: Path | None = None

    @property
    def run_id(self) -> str:
        """Name of the run's folder."""
        return self.run_url.rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        """As it can be written again."""
        parts = [self.run_url, self.stage, "" if self.step is None else str(self.step)]
        return "/".join(part for part in parts if part)


def find_place(text: str, runs: Path) -> Place:
    """The checkpoints that a command's argument means.

    A name is that of a run in ``runs`` if there is one, else a path. A url may name a run
    (``s3://BUCKET/PREFIX/RUN``), a job (its newest run there), or any folder below a run.

    Args:
        text: one of the forms of ``FORMS``.
        runs: folder of this machine's runs.

    Raises:
        UnknownRunError: nothing of that name is there; says what is. Or a url that no store has.
        StoreError: the store does not answer, or refuses.
    """
    if "://" in text:
        return _at_url(text)
    path = Path(text).expanduser()
    if text.startswith((".", "/", "~")):
        return _at_url(f"file://{path}")
    from ringworld_platform.run_view import FolderView, find_status

    name, *tail = text.rstrip("/").split("/")
    try:
        found = find_status(FolderView(runs), name)
    except UnknownRunError as error:
        if any(place.is_dir() for place in (path, *list(path.parents)[:2]) if place.name):
            return _at_url(f"file://{path}")
        raise UnknownRunError(f"{error}; {FORMS}") from None
    run_id = str(found["run_id"])
    folder = runs.absolute() / run_id
    stage, step = _stage_and_step(tail, text)
    run_url = _store_of(folder, run_id)
    return Place(run_url, f"{run_url}/{CHECKPOINTS_FOLDER}", stage, step, folder)


def target_of(text: str, run_id: str) -> Place:
    """Where a copy of a run goes: into a store, under the run's own name.

    Args:
        text: url or path of the store, or of the run's folder in it.
        run_id: name of the run.

    Raises:
        UnknownRunError: a url that no store has.
    """
    url = text if "://" in text else f"file://{Path(text).expanduser()}"
    _check_url(url)
    scheme, _, path = url.partition("://")
    path = (os.path.abspath(path) if scheme == "file" else path).rstrip("/")
    if path.rpartition("/")[2] != run_id:
        path = f"{path}/{run_id}"
    return Place(f"{scheme}://{path}", f"{scheme}://{path}/{CHECKPOINTS_FOLDER}")


def read_spec_text(place: Place) -> bytes:
    """The resolved spec of a place's run, as YAML.

    Raises:
        UnknownRunError: there is none beside the checkpoints.
        StoreError: the store failed.
    """
    from ringworld_platform.run_records import SPEC_FILE
    from ringworld_workers.store.base import NotFound
    from ringworld_workers.store.opening import open_store

    here = place.folder / SPEC_FILE if place.folder else None
    if here is not None and here.is_file():
        return here.read_bytes()
    try:
        return open_store(place.run_url).get(SPEC_FILE)
    except NotFound:
        raise UnknownRunError(
            f"{place.run_url} has no {SPEC_FILE}: what lies there is no run's folder, or not a "
            "whole one"
        ) from None


def kept_by_spec(place: Place) -> int:
    """How many checkpoints a run's spec keeps; the default where there is no spec to be read."""
    import yaml

    from ringworld_jobs.spec import CheckpointSpec

    try:
        spec = yaml.safe_load(read_spec_text(place))
        return int(spec["checkpoint"]["keep"])
    except (UnknownRunError, yaml.YAMLError, LookupError, TypeError, ValueError):
        return CheckpointSpec().keep


def _store_of(folder: Path, run_id: str) -> str:
    """Where a run of this machine has its checkpoints: in S3 if its spec says so, else here."""
    from ringworld_platform.run_records import read_spec

    store = (read_spec(folder).get("checkpoint") or {}).get("store", "")
    # Not what a file:// store says: the folder of runs may have been moved.
    return f"{store.rstrip('/')}/{run_id}" if store.startswith("s3://") else f"file://{folder}"


def _check_url(url: str) -> None:
    """Refuse what can be no place in a store, before a store is asked."""
    from ringworld_jobs.store_url import UnsafeUrl, parse_store

    try:
        parse_store(url)
    except ValueError as error:
        shown = "" if isinstance(error, UnsafeUrl) else f"{url}: "
        raise UnknownRunError(f"{shown}{error}") from None


def _at_url(url: str) -> Place:
    """The run is found by asking the store: a url does not tell where its name ends."""
    _check_url(url)
    scheme, _, path = url.partition("://")
    if scheme == "file":
        path = os.path.abspath(path)
    parts = path.rstrip("/").split("/")
    if parts[-1] == _MANIFEST:
        parts = parts[:-1]
    folders = _Folders(scheme, parts[0])
    splits = [(parts[: len(parts) - n], parts[len(parts) - n :]) for n in range(min(3, len(parts)))]
    for head, tail in splits:
        root = _root_of(folders, head)
        if root is not None:
            return _place(scheme, root, tail, url)
    for head, tail in splits:
        root = _newest_run(folders, head)
        if root is not None:
            return _place(scheme, root, tail, url)
    raise UnknownRunError(f"{url} holds no checkpoints{_nearby(folders, scheme, parts)}; {FORMS}")


class _Folders:
    """The names of the folders in a folder; a bucket is connected to once."""

    def __init__(self, scheme: str, bucket: str) -> None:
        self._scheme = scheme
        self._bucket = None if scheme == "file" else _open(scheme, [bucket])

    def __call__(self, parts: list[str]) -> list[str]:
        if self._bucket is not None:
            return list(self._bucket.folders("/".join(parts[1:])))
        # The file system's root has no runs.
        return list(_open(self._scheme, parts).folders()) if any(parts) else []


def _place(scheme: str, root: list[str], tail: list[str], text: str) -> Place:
    """Of the root of a run's checkpoints, which may lie without a run."""
    stage, step = _stage_and_step(tail, text)
    run = root[:-1] if root[-1] == CHECKPOINTS_FOLDER else root
    folder = Path("/".join(run)) if scheme == "file" else None
    return Place(f"{scheme}://{'/'.join(run)}", f"{scheme}://{'/'.join(root)}", stage, step, folder)


def _root_of(folders: _Folders, parts: list[str]) -> list[str] | None:
    """Where the folders of stages are: in this folder, or in its folder ``checkpoints``."""
    names = folders(parts)
    if _has_steps(folders, parts, names):
        return parts
    below = [*parts, CHECKPOINTS_FOLDER]
    # A store may be called checkpoints too; then runs are in it, and no stages.
    if CHECKPOINTS_FOLDER in names and _has_steps(folders, below, folders(below)):
        return below
    return None


def _has_steps(folders: _Folders, parts: list[str], names: list[str]) -> bool:
    stage = next((name for name in names if _STAGE_FOLDER.fullmatch(name)), None)
    return stage is not None and any(n.startswith("step-") for n in folders([*parts, stage]))


def _newest_run(folders: _Folders, parts: list[str]) -> list[str] | None:
    """Of the job whose name stands last: job-1, job-2, ... lie beside where it would."""
    *parent, name = parts
    if not parent or not name:
        return None
    numbered = re.compile(rf"{re.escape(name)}-(\d+)")
    found = [(int(m[1]), m[0]) for m in map(numbered.fullmatch, folders(parent)) if m]
    for _, run_id in sorted(found, reverse=True):
        root = _root_of(folders, [*parent, run_id])
        if root is not None:
            return root
    return None


def _nearby(folders: _Folders, scheme: str, parts: list[str]) -> str:
    """What there is instead: in the deepest folder of the url that holds anything."""
    for number in range(len(parts)):
        head, tail = parts[: len(parts) - number], parts[len(parts) - number :]
        names = folders(head)
        if names:
            near = difflib.get_close_matches(tail[0], names, n=1) if tail else []
            if near:
                return f"; did you mean {near[0]}?"
            more = ", ..." if len(names) > _MAX_NAMED else ""
            listed = ", ".join(names[:_MAX_NAMED])
            return f"; in {scheme}://{'/'.join(head)} there are {listed}{more}"
    return ""


def _open(scheme: str, parts: list[str]) -> Store:
    from ringworld_workers.store.opening import open_store

    return open_store(f"{scheme}://{'/'.join(parts)}")


def _stage_and_step(tail: list[str], text: str) -> tuple[str, int | None]:
    if len(tail) > 2:
        raise UnknownRunError(f"{text} has too many parts; {FORMS}")
    if len(tail) < 2:
        return (tail[0] if tail else ""), None
    found = _STEP.fullmatch(tail[1])
    if not found:
        raise UnknownRunError(f"{text}: {tail[1]!r} is no step; write 60 or step-00000060")
    return tail[0], int(found[1])
