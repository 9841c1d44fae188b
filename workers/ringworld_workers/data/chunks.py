"""Long texts in chunks of so many tokens, cut between sentences where there are any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Count = Callable[[Sequence[str]], Sequence[int]]
"""Tokens of each text."""

_END = re.compile(r"[.!?](?:[\"')\]\u201d\u2019]*)(?=\s)|[\u3002\uff01\uff1f]|\n(?=\s*\n)")
_NOT_AN_END = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Messrs|Gen|Col|Capt|Lt|Hon|Rev|Sen|Gov|Jr|Sr|No|Nos|vs|etc"
    r"|Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec|cf|viz)\.)$"
)
"""Initials and abbreviations, which a full stop does not end a sentence after."""
_LONGEST_ABBREVIATION = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """A sentence, with the space before it, or as much of one as fits.

    Attributes:
        start: its first character in the text.
        stop: one past its last.
        tokens: of it alone; joined to others it may be a token less or more.
    """

    start: int
    stop: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring pieces.

    Attributes:
        pieces: at least one.
    """

    pieces: tuple[Piece, ...]

    @property
    def start(self) -> int:
        """Its first character in the text."""
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        """One past its last character."""
        return self.pieces[-1].stop

    @property
    def tokens(self) -> int:
        """Tokens of its pieces."""
        return sum(piece.tokens for piece in self.pieces)


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where each sentence starts and stops; together they are the text.

    White space belongs to the sentence that it leads to. A sentence ends at a blank line, or in its
    mark before white space, unless what follows is in lower case or the mark is an abbreviation's.
    """
    start = 0
    for match in _END.finditer(text):
        stop = match.start() if match[0] == "\n" else match.end()
        if match[0].startswith(".") and not _ends(text, match.start() + 1, match.end()):
            continue
        if text[start:stop].strip():
            yield start, stop
            start = stop
    if start < len(text):
        yield start, len(text)


def cut_chunks(text: str, limit: int, count: Count) -> list[Chunk]:
    """A text in chunks, each as many sentences as fit.

    Args:
        text: of any length; blank text has no chunk.
        limit: tokens of a chunk at most, at least 1.
        count: counts tokens of many texts at once.

    Returns:
        The chunks; together they are the text. A sentence above the limit is cut between words,
        and a word above it between characters; no character is cut, so a single one may exceed it.
    """
    if not text.strip():
        return []
    spans = list(sentences(text))
    counts = count([text[start:stop] for start, stop in spans])
    chunks: list[Chunk] = []
    held: list[Piece] = []
    tokens = 0
    for (start, stop), size in zip(spans, counts, strict=True):
        for piece in _fitting(text, Piece(start, stop, size), limit, count):
            if held and tokens + piece.tokens > limit:
                chunks.append(Chunk(tuple(held)))
                held, tokens = [], 0
            held.append(piece)
            tokens += piece.tokens
    return [*chunks, Chunk(tuple(held))]


def _ends(text: str, dot: int, stop: int) -> bool:
    """Whether a full stop that ends before ``dot`` ends a sentence; its quotes end at ``stop``."""
    following = text[stop : stop + 4].lstrip()[:1]
    if following.islower():
        return False
    return _NOT_AN_END.search(text, max(0, dot - _LONGEST_ABBREVIATION), dot) is None


def _fitting(text: str, piece: Piece, limit: int, count: Count) -> Iterator[Piece]:
    """The piece, or its halves' halves, cut at the white space nearest to the middle."""
    length = piece.stop - piece.start
    if piece.tokens <= limit or length < 2:
        yield piece
        return
    middle = piece.start + length // 2
    reach = max(1, length // 4)
    spaces = [
        place
        for place in (
            _space(text, range(middle, min(piece.stop, middle + reach))),
            _space(text, range(middle, max(piece.start, middle - reach), -1)),
        )
        if place is not None
    ]
    cut = min(spaces, key=lambda place: abs(place - middle)) if spaces else middle
    halves = [(piece.start, cut), (cut, piece.stop)]
    for (start, stop), size in zip(halves, count([text[a:b] for a, b in halves]), strict=True):
        yield from _fitting(text, Piece(start, stop, size), limit, count)


def _space(text: str, places: range) -> int | None:
    return next((place for place in places if text[place].isspace()), None)
