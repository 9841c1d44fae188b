"""Small charts made of characters, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
# Bit of a braille cell's dot, by column and row (Unicode chart U+2800).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def squeeze(values: Sequence[float], width: int) -> list[float]:
    """At most ``width`` means over equal stretches of ``values``, in order."""
    if len(values) <= width:
        return list(values)
    means = []
    for column in range(width):
        part = values[column * len(values) // width : (column + 1) * len(values) // width]
        means.append(sum(part) / len(part))
    return means


def sparkline(values: Sequence[float], width: int) -> str:
    """One line of blocks, lowest value lowest; empty without values."""
    points = squeeze(values, width)
    if not points:
        return ""
    low, high = min(points), max(points)
    span = high - low or 1.0
    return "".join(_BLOCKS[round((point - low) / span * (len(_BLOCKS) - 1))] for point in points)


def curve_over(
    points: Sequence[tuple[int, float]],
    extent: tuple[int, int],
    limits: tuple[float, float],
    width: int,
    height: int,
) -> list[str]:
    """A line chart of braille dots.

    Args:
        points: (x, y), by x.
        extent: the first x and the last; first < last.
        limits: the lowest y that is drawn and the highest; what lies beyond is drawn at the edge.
        width: characters; each is two dots wide.
        height: lines; each is four dots high.

    Returns:
        ``height`` strings of ``width`` characters, the highest values first.
    """
    (first, last), (low, high) = extent, limits
    sums: dict[int, tuple[float, int]] = {}
    for x, y in points:
        at = min(2 * width - 1, max(0, int((x - first) / (last - first) * 2 * width)))
        total, count = sums.get(at, (0.0, 0))
        sums[at] = total + y, count + 1
    cells = [[0] * width for _ in range(height)]
    before: tuple[int, int] | None = None
    for x in sorted(sums):
        total, count = sums[x]
        mean = min(high, max(low, total / count))
        y = round((high - mean) / (high - low) * (height * 4 - 1))
        for dot_x, dot_y in [(x, y)] if before is None else _joined(before, (x, y)):
            cells[dot_y // 4][dot_x // 2] |= _DOTS[dot_x % 2][dot_y % 4]
        before = x, y
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def _joined(begin: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The dots of a line, its first one left out: a steep piece is a line and not two dots."""
    (x0, y0), (x1, y1) = begin, end
    y = y0
    for x in range(x0 + 1, x1 + 1):
        to = y0 + round((y1 - y0) * (x - x0) / (x1 - x0))
        for each in _between(y, to):
            yield x, each
        y = to


def _between(last: int, y: int) -> range:
    if y > last:
        return range(last + 1, y + 1)
    return range(y, last) if y < last else range(y, y + 1)
