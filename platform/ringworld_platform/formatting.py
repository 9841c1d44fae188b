"""Figures as people read them in a terminal or a report."""

from __future__ import annotations

from collections.abc import Iterable


def duration(seconds: float | None) -> str:
    """Turn 75.2 into ``1m 15s``; None gives a dash."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {left:02d}s" if minutes else f"{left}s"


def step_duration(seconds: float) -> str:
    """As ``duration``, finer below ten seconds: ``12 ms``, ``0.43s``, ``4m 13s``."""
    if seconds < 0.0995:
        return f"{seconds * 1e3:.2g} ms"
    return f"{seconds:.2f}s" if seconds < 10 else duration(seconds)


def quantity(value: float | None) -> str:
    """Turn 12345 into ``12.3k``; None gives a dash."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def loss(value: float | None) -> str:
    """Three decimals; None gives a dash."""
    return "-" if value is None else f"{value:.3f}"


def mesh_text(ring: object, heads: object, rings: object) -> str:
    """``4 x 1`` for a ring of 4 and one of them, ``4 x 2 x 1`` where 2 workers split its heads."""
    return f"{ring} x {rings}" if heads in (None, 1) else f"{ring} x {heads} x {rings}"


def mesh_heading(heads: Iterable[object]) -> str:
    """What the parts of ``mesh_text`` are, in a column where ``heads`` are the heads sizes."""
    split = any(size not in (None, 1) for size in heads)
    return "ring x heads x dp" if split else "ring x dp"


def bytes_text(value: float | None) -> str:
    """Turn 3 * 2**30 into ``3.0 GiB``; None gives a dash."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.1f} {unit}" if unit != "B" else f"{value:.0f} B"
        value /= 1024
    return f"{value:.1f} TiB"
