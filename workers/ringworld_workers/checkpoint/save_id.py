"""Names of the objects that a save writes: no two saves write the same one. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"/rank-\d{5,}-([0-9a-f]{12})-(\d{4,})(?:-\d{4,})?\.bin$")


@dataclass(frozen=True)
class SaveId:
    """One save of one gang.

    A save that is cut short, repeated, or raced by a gang that should be dead, so never touches an
    object of a committed checkpoint; and what a failed save has left can be told from what a busy
    one is writing.
    """

    token: str
    """Of the gang: see ``fence.WriterRecord``."""
    number: int
    """Of the save, counted by the gang from 1."""

    def key(self, folder: str, rank: int, piece: int | None = None) -> str:
        """Key of a rank's object; ``piece`` where its share is cut into several."""
        part = "" if piece is None else f"-{piece:04d}"
        return f"{folder}/rank-{rank:05d}-{self.token}-{self.number:04d}{part}.bin"

    @staticmethod
    def of(key: str) -> SaveId | None:
        """Which save wrote an object; None if its name does not tell."""
        found = _NAME.search(key)
        return SaveId(found[1], int(found[2])) if found else None
