"""Checkpoints as a person reads them in a terminal: tables, facts, findings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ringworld_workers.checkpoint.layout import Manifest
    from ringworld_workers.checkpoint.retention import Removable
    from ringworld_workers.checkpoint_tools.diff import Difference
    from ringworld_workers.checkpoint_tools.listing import Listing
    from ringworld_workers.checkpoint_tools.verify import VerifyReport

_LARGEST = 5
_MAX_PROBLEMS = 10
_MAX_VALUE = 60
KINDS = {
    "checkpoint": "a committed checkpoint",
    "uncommitted": "a save that was not committed, or is on its way",
    "set aside": "a damaged checkpoint that was set aside",
    "unreferenced": "an object beside those of its checkpoint",
    "unfinished": "an upload that was not completed, or is on its way",
}


def print_listing(console: Console, url: str, listing: Listing) -> None:
    """A table of what is committed, and below it what is not."""
    console.print(url, style="bold", markup=False)
    if listing.entries:
        _print_entries(console, listing)
    else:
        console.print("no committed checkpoint")
    _print_leftovers(console, listing)


def print_manifest(console: Console, url: str, manifest: Manifest, *, all_tensors: bool) -> None:
    """What a manifest says; of the tensors the largest, or all."""
    console.print(url, style="bold", markup=False)
    for name, text in _facts(manifest):
        console.print(f"  {name:<14}{text}", markup=False)
    _print_tensors(console, manifest, whole=all_tensors)
    _print_objects(console, manifest)


def _print_entries(console: Console, listing: Listing) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ringworld_platform.formatting import bytes_text, mesh_heading, quantity

    made = [entry.manifest.mesh for entry in listing.entries if entry.manifest]
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("stage")
    for heading in ("step", "tokens", "committed", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(mesh_heading(mesh.get("heads") for mesh in made), no_wrap=True)
    table.add_column("held-out loss")
    table.add_column("")
    for entry in listing.entries:
        place = (escape(entry.ref.stage), str(entry.ref.step))
        manifest = entry.manifest
        if manifest is None:
            unknown = ["-"] * 3
            note = f"[red]{escape(entry.problem)}[/red]"
            table.add_row(*place, "-", _ago(entry.committed), *unknown, note)
            continue
        state = manifest.state
        table.add_row(
            *place,
            quantity(state.tokens),
            _ago(entry.committed),
            bytes_text(entry.size),
            _mesh(manifest),
            _held_out(state.metrics),
            "end" if state.final else "",
        )
    console.print(table)


def _print_leftovers(console: Console, listing: Listing) -> None:
    if not listing.leftovers:
        return
    console.print("\nnot part of any checkpoint:")
    for left in listing.leftovers:
        console.print(f"  {removable_line(left)}", markup=False)
    console.print("`ringworld checkpoints prune` removes the old ones", style="dim", markup=False)


def removable_line(removable: Removable) -> str:
    """Something that may go, or has gone: where, what, how much, how old."""
    from ringworld_platform.formatting import bytes_text

    unknown = removable.kind == "unfinished"
    size = "size unknown" if unknown else bytes_text(removable.num_bytes)
    return f"{removable.key}  {KINDS[removable.kind]}, {size}, {_ago(removable.modified)}"


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    from ringworld_platform.formatting import bytes_text, mesh_heading, quantity

    state, optimizer = manifest.state, manifest.optimizer
    mesh = f"{_mesh(manifest)} ({mesh_heading([manifest.mesh.get('heads')])})"
    final = ", the end of the stage" if state.final else ""
    numel = sum(map(prod, manifest.tensors.values()))
    size = sum(stored.size for stored in manifest.objects)
    facts = [
        ("run", f"{manifest.run_id}, attempt {manifest.attempt}"),
        ("stage", f"{state.stage}, the job's number {state.stage_index + 1}"),
        ("step", f"{state.step}{final}"),
        ("tokens", f"{state.tokens:,}; the stage's next row is {state.cursor:,}"),
        ("learning rate", f"{state.learning_rate:g}"),
        ("mesh", f"{manifest.world_size} ranks, {mesh}"),
        ("parameters", f"{numel:,} ({quantity(numel)}) in {len(manifest.tensors)} tensors"),
        ("size", f"{bytes_text(size)} in {len(manifest.objects)} objects"),
        ("optimizer", f"{optimizer.name}, step {optimizer.step}"),
    ]
    for group in optimizer.groups:
        rates = f"learning rate {group.learning_rate:g}, weight decay {group.weight_decay:g}"
        facts.append(("", f"{group.name}: {rates}"))
    if state.metrics:
        facts.append(("held-out loss", f"{_held_out(state.metrics)} (--json has all figures)"))
    return [*facts, ("spec", state.spec_digest)]


def _print_tensors(console: Console, manifest: Manifest, *, whole: bool) -> None:
    largest = sorted(manifest.tensors.items(), key=lambda item: -prod(item[1]))
    shown = list(manifest.tensors.items()) if whole else largest[:_LARGEST]
    console.print("\ntensors" if whole else "\nlargest tensors")
    width = max((len(name) for name, _ in shown), default=0)
    for name, shape in shown:
        sizes = " x ".join(map(str, shape)) or "scalar"
        console.print(f"  {name:<{width}}  {prod(shape):>14,}  {sizes}", markup=False)
    rest = len(manifest.tensors) - len(shown)
    if rest:
        console.print(f"  and {rest} more (--tensors)", style="dim")


def _print_objects(console: Console, manifest: Manifest) -> None:
    from ringworld_platform.formatting import bytes_text

    console.print("\nobjects")
    for stored in manifest.objects:
        name = stored.key.rpartition("/")[2]
        parts = f"{len(stored.ranges):,} ranges"
        console.print(f"  {name}  {bytes_text(stored.size):>10}  {parts}", markup=False)


def print_report(console: Console, report: VerifyReport, seconds: float) -> None:
    """What reading all of a checkpoint has shown, object by object."""
    from ringworld_platform.formatting import bytes_text, duration

    verdict = "sound" if report.sound else "DAMAGED"
    read = f"{bytes_text(report.bytes_read)} read in {duration(seconds)}"
    style = "green" if report.sound else "red"
    console.print(f"{report.ref.key}: {verdict}, {read}", style=style, markup=False)
    for problem in report.problems:
        console.print(f"  {problem}", style="red", markup=False)
    for held in report.objects:
        name, size = held.key.rpartition("/")[2], bytes_text(held.size)
        judged = "damaged" if held.problems else "ok"
        ranges = f"{held.num_ranges:,} ranges"
        console.print(f"  {name}  {size:>10}  {ranges}  {judged}", markup=False)
        for problem in held.problems[:_MAX_PROBLEMS]:
            console.print(f"    {problem}", style="red", markup=False)
        rest = len(held.problems) - _MAX_PROBLEMS
        if rest > 0:
            console.print(f"    and {rest} more (--json)", style="red")
    if report.unreferenced:
        size = bytes_text(sum(info.size for info in report.unreferenced))
        number = len(report.unreferenced)
        console.print(f"  beside them {number} that no one reads, {size}", style="dim")


def print_difference(
    console: Console,
    names: tuple[str, str],
    manifests: tuple[Manifest, Manifest],
    found: Difference,
) -> None:
    """Two checkpoints side by side: what is not the same, and how far apart it is."""
    from rich.markup import escape
    from rich.table import Table

    for sign, name, manifest in zip("AB", names, manifests, strict=True):
        mesh = f"{manifest.world_size} ranks, {_mesh(manifest)}"
        text = f"{sign}  {name}  ({manifest.run_id}, attempt {manifest.attempt}, {mesh})"
        console.print(text, style="bold", markup=False)
    figures = [change for change in found.values if change.name.startswith("metrics.")]
    for change in (*found.values, *found.shapes):
        if change in figures:
            continue
        shown = (_short(value) for value in (change.first, change.second))
        console.print(f"  {change.name}: {' and '.join(shown)}", markup=False)
    if figures:
        console.print(f"  held-out figures: {len(figures)} differ (--json has them)")
    if found.tensors:
        table = Table(box=None, header_style="dim", pad_edge=False)
        table.add_column("tensor", overflow="fold")
        table.add_column("kind", no_wrap=True)
        for heading in ("different", "of", "max abs", "relative"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in found.tensors:
            counts = f"{row.num_different:,}", f"{row.numel:,}"
            sizes = f"{row.max_abs:.3g}", f"{row.relative:.3g}"
            table.add_row(escape(row.tensor), row.kind, *counts, *sizes)
        console.print(table)
    number = f"{found.num_equal} tensor{'s' if found.num_equal != 1 else ''}"
    verdict = "equal: nothing differs, and all" if found.equal else "they differ;"
    console.print(f"{verdict} {number} (moments counted) are bit-equal")


def _held_out(metrics: Mapping[str, float]) -> str:
    """The losses by modality; those of parts of a row, and other figures, are for JSON."""
    from ringworld_platform.formatting import loss

    known = [name for name in ("text", "vision") if f"loss_{name}" in metrics]
    return ", ".join(f"{name} {loss(metrics[f'loss_{name}'])}" for name in known)


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def _mesh(manifest: Manifest) -> str:
    from ringworld_platform.formatting import mesh_text

    mesh = manifest.mesh
    heads = mesh.get("heads", 1)
    ring = mesh.get("sequence_parallel", 1) // heads
    return mesh_text(ring, heads, mesh.get("data_parallel", 1))


def _ago(moment: float) -> str:
    from ringworld_platform.formatting import duration

    return f"{duration(max(0.0, time.time() - moment))} ago" if moment else "-"
