"""What new tokens see of a cache: rectangles of queries and slots, and the kernel calls for them.

A pass adds neighbouring tokens of some rows. Its queries are numbered in the order of the rows, and
within a row by position, over all of them or over those whose tokens one rank keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringworld_model.decode.deal import Deal
from ringworld_model.decode.pages import Piece, RowCache
from ringworld_model.ring.rectangle import Rectangle, cover_staircase


class Segment(NamedTuple):
    """New tokens of one row: positions [start, stop), of which [0, start) are in the cache."""

    row: RowCache
    start: int
    stop: int


class Queries(NamedTuple):
    """Queries ``at`` and following: neighbouring tokens of a row, kept by one rank."""

    segment: int
    at: int
    start: int
    stop: int
    owner: int


class Call(NamedTuple):
    """One kernel call: ``queries`` see the slots of ``keys``, all or as a diagonal."""

    queries: slice | Tensor
    keys: Piece
    diagonal: bool


def cut_passes(
    starts: Sequence[int], counts: Sequence[int], chunk: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Cut prompts into passes of at most ``chunk`` tokens: (prompt, start, stop) by position."""
    passing: list[tuple[int, int, int]] = []
    room = chunk
    for prompt, (start, count) in enumerate(zip(starts, counts, strict=True)):
        stop = start + count
        while start < stop:
            taken = min(room, stop - start)
            passing.append((prompt, start, start + taken))
            start, room = start + taken, room - taken
            if room == 0:
                yield passing
                passing, room = [], chunk
    if passing:
        yield passing


def list_queries(deal: Deal, segments: Sequence[Segment], rank: int | None) -> list[Queries]:
    """The queries of a pass: a rank's, or all where ``rank`` is None."""
    found: list[Queries] = []
    at = 0
    for number, (row, start, stop) in enumerate(segments):
        for run in deal.runs(start, stop, row.first):
            if rank in (None, run.owner):
                found.append(Queries(number, at, *run))
                at += run.stop - run.start
    return found


def count_queries(queries: Sequence[Queries]) -> int:
    """Tokens of ``list_queries``."""
    return queries[-1].at + queries[-1].stop - queries[-1].start if queries else 0


def rectangles(
    deal: Deal, segments: Sequence[Segment], queries: Sequence[Queries], key_rank: int
) -> Iterator[tuple[int, Rectangle]]:
    """What queries see of the slots of one rank: each visible pair once.

    Yields:
        (segment, rectangle of query numbers and slots). The cache from before the pass is one
        rectangle a segment.
    """
    by_segment: dict[int, list[Queries]] = {}
    for each in queries:
        by_segment.setdefault(each.segment, []).append(each)
    for number, (row, start, stop) in enumerate(segments):
        mine = by_segment.get(number, [])
        if not mine:
            continue
        # One new token sees itself, too: a diagonal of one is no call of its own.
        alone = stop - start == 1
        before = deal.held(stop if alone else start, key_rank, row.first)
        if before:
            yield number, Rectangle(mine[0].at, count_queries(mine), 0, before, False)
        if alone:
            continue
        strips: list[tuple[int, int, int]] = []
        for _, at, begin, end, owner in mine:
            seen = deal.held(begin, key_rank, row.first)
            last = at + end - begin
            if owner == key_rank:
                yield number, Rectangle(at, last, seen, seen + end - begin, True)
            if strips and strips[-1][2] == seen:
                strips[-1] = (strips[-1][0], last, seen)
            elif seen > before:
                strips.append((at, last, seen))
        for rectangle in cover_staircase(strips, before) if strips else ():
            yield number, rectangle


def list_calls(
    found: Iterable[tuple[int, Rectangle]],
    pieces: Callable[[int, int, int], Iterable[Piece]],
    device: torch.device,
) -> list[Call]:
    """Kernel calls for rectangles, those of rows that share memory made one.

    Args:
        found: of ``rectangles``.
        pieces: (segment, start, stop) -> where the slots lie.
        device: of the queries.
    """
    calls: list[Call] = []
    full: dict[tuple[int, int, int], tuple[Piece, list[slice]]] = {}
    for segment, (q0, q1, k0, k1, diagonal) in found:
        parts = list(pieces(segment, k0, k1))
        if diagonal and len(parts) == 1:
            calls.append(Call(slice(q0, q1), parts[0], True))
            continue
        done = q0
        for part in parts:
            if diagonal:
                # A page ends within the diagonal: what follows sees this part whole.
                stop = done + part.stop - part.start
                calls.append(Call(slice(done, stop), part, True))
                done = stop
                if done == q1:
                    continue
            place = (part.memory.data_ptr(), part.start, part.stop)
            _, rows = full.setdefault(place, (part, []))
            rows.append(slice(done, q1))
    for part, rows in full.values():
        at: slice | Tensor = rows[0]
        if len(rows) > 1:
            at = torch.cat([torch.arange(each.start, each.stop) for each in rows]).to(device)
        calls.append(Call(at, part, False))
    return calls
