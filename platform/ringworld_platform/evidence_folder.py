"""The folders of evidence in a run's folder: a new one for a failure, and the oldest removed.

A run may be built again hundreds of times, and its evidence is copied to its store and looked at
by people: what the newest attempts have left is what they look for.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

EVIDENCE_FOLDER = "evidence"
KEPT_ATTEMPTS = 20
"""Attempts whose evidence a run's folder keeps; at least two, so that one is always there."""
_ATTEMPT = re.compile(r"attempt-(\d+)-")


def new_folder(run_folder: Path, attempt: int, kind: str) -> Path:
    """Make ``attempt-N-KIND``, or ``attempt-N-KIND-2`` where that is there: both are kept.

    Args:
        run_folder: the run's.
        attempt: that has failed; evidence of those long before it is removed.
        kind: of the failure, in words.

    Raises:
        OSError: it cannot be made.
    """
    parent, name = run_folder / EVIDENCE_FOLDER, f"attempt-{attempt}-{kind.replace(' ', '-')}"
    parent.mkdir(exist_ok=True)
    # First, for a disk may be full.
    _prune(parent, attempt)
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / name}: a thousand are there")


def _prune(parent: Path, attempt: int) -> None:
    """Remove what is of none of the newest attempts, the one at hand counted among them."""
    found: dict[int, list[Path]] = {attempt: []}
    for path in parent.iterdir():
        if named := _ATTEMPT.match(path.name):
            found.setdefault(int(named[1]), []).append(path)
    for old in sorted(found)[:-KEPT_ATTEMPTS]:
        for path in found[old]:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                # What is in the way of tidying up must not be in the way of new evidence.
                log.warning("%s is not removed: %s", path, error)
