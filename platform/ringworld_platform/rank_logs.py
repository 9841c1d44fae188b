"""The ranks' logs in a run's folder: pieces of bounded size, of which the first and the last stay.

A rank's log begins as ``logs/rank-0.log`` and goes on in ``logs/rank-0.1.log`` and so forth, each
piece about ``PIECE_BYTES`` long. A place in the whole is a number: a piece's number times
``PIECE_BYTES``, and the bytes before it in the piece. So it stays valid when pieces go.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

LOGS_FOLDER = "logs"
PIECE_BYTES = 8 << 20
LAST_PIECES = 3
"""Kept besides the first one, which tells of the start: so a rank's log takes 32 MiB at most."""
PAGE_BYTES = 1 << 20
_NAME = re.compile(r"rank-(\d+)(?:\.(\d+))?\.log")


def piece_name(rank: int, piece: int) -> str:
    """File of a piece, below the run's folder."""
    return f"{LOGS_FOLDER}/rank-{rank}{f'.{piece}' if piece else ''}.log"


def is_rank_log(file: str) -> bool:
    """Whether a file of the folder of logs is a piece of one."""
    return _NAME.fullmatch(file) is not None


def pieces(folder: Path) -> dict[int, list[int]]:
    """The numbers of the pieces that are there, in order, by rank.

    Args:
        folder: of the run.
    """
    found: dict[int, list[int]] = defaultdict(list)
    try:
        names = os.listdir(folder / LOGS_FOLDER)
    except FileNotFoundError:
        return {}
    for name in names:
        if match := _NAME.fullmatch(name):
            found[int(match[1])].append(int(match[2] or 0))
    return {rank: sorted(found[rank]) for rank in sorted(found)}


def ends(folder: Path) -> dict[int, int]:
    """The place behind the last line of each rank's log."""
    found = {}
    for rank, numbers in pieces(folder).items():
        path = folder / piece_name(rank, numbers[-1])
        found[rank] = numbers[-1] * PIECE_BYTES + path.stat().st_size
    return found


def read(folder: Path, rank: int, after: int = 0) -> tuple[list[str], int]:
    """Whole lines from a place on, about a mebibyte of them.

    Args:
        folder: of the run.
        rank: whose log.
        after: the place. Where lines are gone, those that are left follow.

    Returns:
        The lines, and the place behind them.
    """
    numbers = pieces(folder).get(rank, [])
    at = max(0, bisect_right(numbers, after // PIECE_BYTES) - 1)
    for index in range(at, len(numbers)):
        start = numbers[index] * PIECE_BYTES
        after = max(after, start)
        try:
            with (folder / piece_name(rank, numbers[index])).open("rb") as file:
                file.seek(after - start)
                data = file.read(PAGE_BYTES)
        except FileNotFoundError:
            continue  # removed since
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and len(data) == PAGE_BYTES:
            whole = data  # a line that is longer than a page is cut
        if whole:
            lines = whole.decode("utf-8", "replace").split("\n")
            return lines[:-1] if whole.endswith(b"\n") else lines, after + len(whole)
    return [], after


class Rotation:
    """Says which piece of its log a rank writes at present; one writer."""

    def __init__(self, folder: Path) -> None:
        """Take a run's folder, and go on where its logs end."""
        self._folder = folder
        self._at: dict[int, tuple[int, int]] = {}
        self._pieces: dict[int, list[int]] | None = None

    def piece_for(self, rank: int, size: int) -> tuple[str, str | None]:
        """The file that takes so many more bytes of a rank, and the one that is full by now.

        Args:
            rank: whose log.
            size: bytes of whole lines.
        """
        if self._pieces is None:
            self._pieces = pieces(self._folder)
        piece, written = self._at.get(rank) or self._last(rank)
        full = None
        if written and written + size > PIECE_BYTES:
            full = piece_name(rank, piece)
            # One that was written before there were pieces may be longer than one.
            piece, written = piece + -(-written // PIECE_BYTES), 0
            self._forget(rank, piece)
        self._at[rank] = piece, written + size
        return piece_name(rank, piece), full

    def _last(self, rank: int) -> tuple[int, int]:
        numbers = (self._pieces or {}).get(rank, [])
        if not numbers:
            return 0, 0
        path = self._folder / piece_name(rank, numbers[-1])
        return numbers[-1], path.stat().st_size if path.exists() else 0

    def _forget(self, rank: int, new: int) -> None:
        numbers = [*(self._pieces or {}).get(rank, []), new]
        numbers = numbers if numbers[0] == 0 else [0, *numbers]
        for number in numbers[1:-LAST_PIECES]:
            (self._folder / piece_name(rank, number)).unlink(missing_ok=True)
        kept = [numbers[0], *numbers[1:][-LAST_PIECES:]]
        if self._pieces is not None:
            self._pieces[rank] = kept
