"""The table and the figures of benchmarks/checkpoint.py."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from datetime import date
from pathlib import Path
from typing import Any

MIB = 2**20


def write(
    options: argparse.Namespace, found: dict[str, dict[str, Any]], ranks: int, seconds: float
) -> None:
    """Write the result beside the others, and print the table."""
    rows = [row for store, figures in found.items() for row in rows_of(store, figures)]
    size = next(iter(found.values()))["bytes"]
    lines = [
        "# Checkpoints: what saving and loading cost",
        "",
        f"`python benchmarks/checkpoint.py` on {os.cpu_count()} cores ({platform.machine()}), "
        f"{ranks} ranks of one thread, ZeRO-1 with AdamW, {size / MIB:.0f} MiB of state, "
        f"{seconds:.0f} s in all. SeaweedFS runs on the same machine at the lowest priority: it "
        "stands for another machine. Ours and plain boto3 took turns; figures are medians of "
        f"{options.saves}, of steps means over {options.rounds} rounds in turns.",
        "",
        "| store | what | measured | goal | met |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    name = options.results / f"checkpoint-{date.today().isoformat()}"
    options.results.mkdir(parents=True, exist_ok=True)
    name.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    # Not the places on this machine.
    about = {
        key: str(value) for key, value in vars(options).items() if key not in ("folder", "results")
    }
    content = {"options": about, "ranks": ranks, "cores": os.cpu_count(), "stores": found}
    name.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(Path(f"{name}.md").read_text(encoding="utf-8"))


def rows_of(store: str, figures: dict[str, Any]) -> list[list[str]]:
    """One store's rows: what, measured, goal, and whether it is met."""
    size, saves = figures["bytes"], figures["saves"]
    wall = median(save["wall_seconds"] for save in saves)
    stall = median(save["stall_seconds"] for save in saves)
    share = median(save["stall_seconds"] / save["wall_seconds"] for save in saves)
    memory, beyond = figures["memory"], figures["memory"]["extra"] - figures["memory"]["snapshot"]
    quiet, busy = (statistics.fmean(figures[f"{k}_step_seconds"]) for k in ("quiet", "busy"))
    load = median(figures["load_seconds"])
    rows = [
        row(
            "stall of a save",
            f"{stall:.3f} s of {wall:.2f} s: {share:.1%}",
            "<= 5 %",
            share <= 0.05,
        ),
        row(
            "extra memory a rank",
            f"{memory['extra'] / MIB:.0f} MiB: snapshot {memory['snapshot'] / MIB:.0f} "
            f"{beyond / MIB:+.0f} MiB",
            "<= snapshot + 64 MiB",
            beyond <= 64 * MIB,
        ),
        row(
            "steps while a save is on its way",
            f"{busy:.3f} s against {quiet:.3f} s: {busy / quiet - 1:+.1%} "
            f"({len(figures['busy_step_seconds'])} and {len(figures['quiet_step_seconds'])} steps)",
            "<= 10 % slower",
            busy <= 1.1 * quiet,
        ),
    ]
    if plain := figures["plain_put_seconds"]:
        ratio = median(plain) / wall
        rows.insert(
            1,
            row(
                "save, against boto3's upload_fileobj",
                f"{size / wall / MIB:.0f} MiB/s against {size / median(plain) / MIB:.0f}: "
                f"{ratio:.2f}x",
                ">= 1.0x",
                ratio >= 1.0,
            ),
        )
        ratio = median(figures["plain_get_seconds"]) / load
        rows.append(
            row(
                "load, against boto3's ranged GETs",
                f"{size / load / MIB:.0f} MiB/s against "
                f"{size / median(figures['plain_get_seconds']) / MIB:.0f}: {ratio:.0%}",
                ">= 80 %",
                ratio >= 0.8,
            )
        )
    else:
        rows.insert(1, ["save", f"{size / wall / MIB:.0f} MiB/s", "", ""])
        rows.append(["load", f"{size / load / MIB:.0f} MiB/s", "", ""])
    return [[store, *cells] for cells in rows]


def row(what: str, measured: str, goal: str, met: bool) -> list[str]:
    """A row that has a goal."""
    return [what, measured, goal, "yes" if met else "no"]


def median(values: Any) -> float:
    """Of any iterable of numbers."""
    return statistics.median(list(values))
