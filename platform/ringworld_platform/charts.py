"""Small charts made of characters, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

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


def curve(values: Sequence[float], width: int, height: int) -> list[str]:
    """A line chart of braille dots.

    Args:
        values: [N], oldest first.
        width: characters; each is two dots wide.
        height: lines; each is four dots high.

    Returns:
        ``height`` strings of ``width`` characters, the highest values first.
    """
    points = squeeze(values, width * 2)
    cells = [[0] * width for _ in range(height)]
    if points:
        low, high = min(points), max(points)
        span = high - low or 1.0
        last: int | None = None
        for x, point in enumerate(points):
            y = round((high - point) / span * (height * 4 - 1))
            # Joined to its neighbour, so that a steep piece is a line and not two dots.
            for dot in range(y, y + 1) if last is None else _between(last, y):
                cells[dot // 4][x // 2] |= _DOTS[x % 2][dot % 4]
            last = y
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def _between(last: int, y: int) -> range:
    if y > last:
        return range(last + 1, y + 1)
    return range(y, last) if y < last else range(y, y + 1)
