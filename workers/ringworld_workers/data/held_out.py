"""Which documents are kept for validation: by file name, or by a share of all."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Sequence

from ringworld_workers.data.files import DataError, InputFile


def named_held_out(
    dataset: str,
    patterns: Sequence[str],
    files: Iterable[InputFile],
    names: Callable[[InputFile], Sequence[str]] = lambda file: (file.path.name,),
) -> frozenset[str]:
    """Labels of the files that match a ``held_out`` pattern.

    Args:
        dataset: name of the dataset, for the message.
        patterns: its ``held_out``.
        files: its files.
        names: what a pattern is matched against.

    Raises:
        DataError: a pattern matches none, which is a slip.
    """
    files = list(files)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {
            file.label
            for file in files
            if any(fnmatch.fnmatchcase(name, pattern) for name in names(file))
        }
        if not found:
            raise DataError(
                f"datasets.{dataset}.held_out: {pattern!r} matches the name of none of the "
                f"dataset's files; correct it, or add the file to datasets.{dataset}.files"
            )
        chosen |= found
    return frozenset(chosen)


def drawn_held_out(document: str, share: float, seed: int) -> bool:
    """Whether a document is among the share that is held out.

    It depends on the document and the seed alone, so that a document stays on its side however the
    rest of the data changes; of many documents, about ``share`` are drawn.
    """
    if share <= 0:
        return False
    digest = hashlib.sha256(f"{seed}\0{document}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
