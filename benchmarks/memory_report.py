"""The tables and the picture of benchmarks/memory.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIB = 2**20


def write(out: Path, result: dict[str, Any]) -> None:
    """Write the figures as JSON, as tables, and as a picture where matplotlib is installed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*head(result), *steps(result["rows"]), *reach(result)]) + "\n"
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(text)
    try:
        draw(out.with_suffix(".svg"), result)
    except ImportError:
        print("no picture: matplotlib is not installed")


def head(result: dict[str, Any]) -> list[str]:
    """What was run."""
    options, model = result["options"], result["model"]
    clock = "wall" if options["device"] == "cuda" else "CPU seconds"
    how = "the allocator's" if options["device"] == "cuda" else "live tensors, counted"
    return [
        f"# Memory levers, {result['date']}",
        "",
        f"{result['machine']}. Load average before and after: {result['load']}.",
        "",
        f"Preset {options['preset']}: {model['num_layers']} layers of {model['hidden_size']}, "
        f"{result['parameters'] / 1e6:,.1f} M parameters, {model['text_vocab_size']:,} words, "
        f"{options['dtype']}; {options['ranks']} rank(s). Tiles: {options['loss_tile']:,} tokens "
        f"of the loss, {options['mlp_tile']:,} of the MLP.",
        "",
        f"One optimizer step on one row of one document. Peak: device memory ({how}), weights, "
        "gradients",
        f"and optimizer state included. Time: {clock}, median of {options['repetitions']}. Each "
        "line adds to the one above.",
        "",
    ]


def steps(rows: list[dict[str, Any]]) -> list[str]:
    """Peak and time by levers and length."""
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(row["levers"] for row in rows))
    found = {(row["levers"], row["tokens"]): row for row in rows}

    def cell(name: str, length: int) -> str:
        row = found[name, length]
        if "seconds" not in row:
            return "out of memory"
        peak = "-" if row["peak"] is None else f"{row['peak'] / MIB:,.1f} MiB"
        return f"{peak}, {row['seconds']:.2f} s"

    lines = ["| levers | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |"]
    lines.append("| --- |" + " ---: |" * len(lengths))
    for name in names:
        lines.append(f"| {name} | " + " | ".join(cell(name, n) for n in lengths) + " |")
    return lines


def reach(result: dict[str, Any]) -> list[str]:
    """The longest context by levers."""
    if not result["longest"]:
        return []
    budget = result["options"]["device_memory"] / MIB
    unit = 1024 if result["options"]["device"] == "cuda" else 256
    lines = [
        "",
        f"Longest row within {budget:,.0f} MiB of device memory, found to {unit:,} tokens or 1/16:",
        "",
        "| levers | tokens | tokens/s |",
        "| --- | ---: | ---: |",
    ]
    for one in result["longest"]:
        least = "at least " if one["limited"] else ""
        rate = one["longest"] / one["seconds"] if one["seconds"] else 0.0
        lines.append(f"| {one['levers']} | {least}{one['longest']:,} | {rate:,.0f} |")
    return lines


def draw(path: Path, result: dict[str, Any]) -> None:
    """Peak memory over length, a line for each combination."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["levers"] for row in result["rows"]):
        mine = [r for r in result["rows"] if r["levers"] == name and r.get("peak")]
        if mine:
            axes.plot(
                [row["tokens"] for row in mine],
                [row["peak"] / MIB for row in mine],
                marker="o",
                markersize=3,
                label=name,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens of the row")
    axes.set_ylabel("peak device memory, MiB")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})
