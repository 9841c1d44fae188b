"""checkpoints list, show, verify, diff, copy, prune: what a run has in its store."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from ringworld_platform.commands.checkpoint_frame import (
    NO_ANSWER,
    URI,
    PlaceText,
    bytes_bar,
    open_place,
    plain_errors,
)
from ringworld_platform.commands.options import DEFAULT_RUNS, Json, Runs
from ringworld_platform.console import FAILED, MISTAKE, err, out


def list_checkpoints(uri: PlaceText, runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """List a run's checkpoints, and what else lies beside them.

    Committed ones are those that a run can continue from. Below them stands what is none:
    leftovers of interrupted saves, damaged ones that were set aside, unfinished uploads.
    """
    from ringworld_platform.checkpoint_display import print_listing
    from ringworld_platform.checkpoint_json import listing_json
    from ringworld_workers.checkpoint_tools.listing import read_listing

    with plain_errors():
        place, store = open_place(uri, runs)
        listing = read_listing(store, place.stage, place.step)
    if as_json:
        typer.echo(json.dumps(listing_json(place.url, listing), indent=1))
        return
    print_listing(out(), place.url, listing)


def show(
    uri: PlaceText,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint's manifest says; the newest one where several are meant."""
    from ringworld_platform.checkpoint_display import print_manifest
    from ringworld_platform.checkpoint_json import manifest_json
    from ringworld_workers.checkpoint_tools.choose import choose_newest, manifest_of

    with plain_errors():
        place, store = open_place(uri, runs)
        ref = choose_newest(store, place.stage, place.step)
        manifest = manifest_of(store, ref)
    url = f"{store.url}/{ref.key}"
    if as_json:
        typer.echo(json.dumps({"url": url, **manifest_json(manifest)}, indent=1))
        return
    print_manifest(out(), url, manifest, all_tensors=tensors)


def verify(uri: PlaceText, runs: Runs = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Read every byte of a checkpoint, or of all of a run, and check it.

    Checked are each object's size and every checksum, and that every element of every tensor is
    there once. Exit code: 0 all is sound, 1 something is damaged, 2 it could not be found out.
    """
    from ringworld_platform.checkpoint_display import print_report
    from ringworld_platform.checkpoint_json import report_json
    from ringworld_workers.checkpoint_tools.choose import choose
    from ringworld_workers.checkpoint_tools.verify import total_bytes
    from ringworld_workers.checkpoint_tools.verify import verify as verify_one

    reports = []
    console = out()
    with plain_errors(NO_ANSWER):
        place, store = open_place(uri, runs)
        for ref in choose(store, place.stage, place.step):
            started = time.monotonic()
            with bytes_bar(ref.key, total_bytes(store, ref)) as advance:
                report = verify_one(store, ref, advance)
            reports.append(report)
            if not as_json:
                print_report(console, report, time.monotonic() - started)
    if as_json:
        typer.echo(json.dumps([report_json(report) for report in reports], indent=1))
    damaged = [report for report in reports if not report.sound]
    if damaged:
        names = ", ".join(report.ref.key for report in damaged)
        err().print(f"{len(damaged)} of {len(reports)} damaged: {names}", style="red", markup=False)
        raise typer.Exit(FAILED)
    if not as_json and len(reports) > 1:
        console.print(f"all {len(reports)} are sound")


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help=URI)],
    second: Annotated[str, typer.Argument(metavar="B", help="Likewise; the newest one of each.")],
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing.")] = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints: state, optimizer, shapes, and every element of every tensor.

    The meshes that wrote them do not matter, nor do the names of their runs. Exit code: 0 they are
    equal bit for bit, 1 they differ, 2 it could not be found out.
    """
    from ringworld_platform.checkpoint_display import print_difference
    from ringworld_platform.checkpoint_json import difference_json
    from ringworld_workers.checkpoint_tools.choose import choose_newest, manifest_of

    with plain_errors(NO_ANSWER):
        (place, store), (other, other_store) = open_place(first, runs), open_place(second, runs)
        refs = (
            choose_newest(store, place.stage, place.step),
            choose_newest(other_store, other.stage, other.step),
        )
        from ringworld_workers.checkpoint_tools.diff import bytes_to_read  # imports torch
        from ringworld_workers.checkpoint_tools.diff import diff as compare

        manifests = manifest_of(store, refs[0]), manifest_of(other_store, refs[1])
        with bytes_bar("comparing", bytes_to_read(*manifests)) as advance:
            found = compare((store, other_store), refs, advance)
    names = f"{store.url}/{refs[0].key}", f"{other_store.url}/{refs[1].key}"
    if as_json:
        typer.echo(json.dumps(difference_json(names, found), indent=1))
    elif not quiet:
        print_difference(out(), names, manifests, found)
    if not found.equal:
        raise typer.Exit(FAILED)


def copy(
    uri: PlaceText,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Folder or url that the run's folder is put into: a store."
        ),
    ],
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Copy a checkpoint, or all of a run, into another store, verified on the way.

    It becomes visible there when it is whole. A copy that was interrupted goes on where it stopped;
    a checkpoint that is there already is never replaced by another one. The run keeps its name.
    """
    from ringworld_platform.checkpoint_places import target_of
    from ringworld_platform.formatting import bytes_text
    from ringworld_workers.checkpoint_tools.choose import choose, manifest_of
    from ringworld_workers.checkpoint_tools.copy import copy_checkpoint, copy_records
    from ringworld_workers.store.opening import open_store

    console = out()
    done = []
    with plain_errors():
        place, store = open_place(uri, runs)
        refs = choose(store, place.stage, place.step)
        run_id = manifest_of(store, refs[-1]).run_id
        to = target_of(target, run_id)
        if to.url == place.url:
            err().print(f"error: {to.url} is where it is already", style="red", markup=False)
            raise typer.Exit(MISTAKE)
        copy_records(open_store(place.run_url), open_store(to.run_url))
        goal = open_store(to.url)
        for ref in refs:
            size = sum(stored.size for stored in manifest_of(store, ref).objects)
            with bytes_bar(ref.key, size) as advance:
                copied = copy_checkpoint(store, ref, goal, advance)
            done.append({"key": ref.key, "bytes": size, "bytes_copied": copied.bytes_copied})
            if not as_json:
                there = f", {copied.num_there} objects were there" if copied.num_there else ""
                text = f"{ref.key}: {bytes_text(copied.bytes_copied)} copied{there}"
                console.print(text, markup=False)
    if as_json:
        typer.echo(json.dumps({"url": to.url, "checkpoints": done}, indent=1))
        return
    console.print(f"in {to.run_url}", markup=False)


def prune(
    uri: PlaceText,
    keep: Annotated[
        int | None,
        typer.Option("--keep", metavar="N", min=1, help="Newest ones to keep; as the spec says."),
    ] = None,
    stage_ends: Annotated[
        bool, typer.Option("--stage-ends", help="The last one of each stage may go too.")
    ] = False,
    older_than: Annotated[
        str,
        typer.Option(
            "--leftovers-older-than", metavar="AGE", help="Age at which leftovers go: 24h, 30min."
        ),
    ] = "24h",
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Only show what would go.")
    ] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    runs: Runs = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Remove old checkpoints, and what interrupted saves have left.

    It shows what goes and asks. The newest two always stay, and so does the last one of each stage
    unless --stage-ends is given. A checkpoint's manifest goes first, so that none is ever half
    there.
    """
    from ringworld_platform.checkpoint_display import removable_line
    from ringworld_platform.checkpoint_json import removable_json
    from ringworld_platform.checkpoint_places import kept_by_spec
    from ringworld_workers.checkpoint.retention import prune as remove

    age = _age(older_than)
    if as_json and not (yes or dry_run):
        raise typer.BadParameter(
            "JSON is for programs: add --yes or --dry-run", param_hint="--json"
        )
    console = out()
    with plain_errors():
        place, store = open_place(uri, runs)
        if place.stage:
            err().print(f"error: {place} is not a run; prune RUN", style="red", markup=False)
            raise typer.Exit(MISTAKE)
        number = kept_by_spec(place) if keep is None else keep
        going = remove(store, number, not stage_ends, unfinished_seconds=age, dry_run=True)
        if not as_json:
            console.print(store.url, style="bold", markup=False)
            for removable in going:
                console.print(f"  {removable_line(removable)}", markup=False)
            if not going:
                console.print("nothing to remove")
        if going and not dry_run:
            if not yes:
                _ask(f"remove these {len(going)}?")
            going = remove(store, number, not stage_ends, unfinished_seconds=age)
            if not as_json:
                console.print(f"{len(going)} removed")
    if as_json:
        typer.echo(json.dumps([removable_json(removable) for removable in going], indent=1))


def _ask(question: str) -> None:
    import sys

    if not sys.stdin.isatty():
        err().print("nothing is removed: nobody is there to ask; add --yes", style="red")
        raise typer.Exit(MISTAKE)
    typer.confirm(question, abort=True)


def _age(text: str) -> float:
    """Seconds, as many as a spec's abort_unfinished_after must have."""
    from ringworld_jobs.files import LEAST_UNFINISHED_SECONDS
    from ringworld_jobs.units import format_seconds, parse_seconds

    hint = "--leftovers-older-than"
    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint=hint) from None
    if seconds < LEAST_UNFINISHED_SECONDS:
        least = format_seconds(LEAST_UNFINISHED_SECONDS)
        raise typer.BadParameter(
            f"{text!r}: so soon a save that is still under way would go; give {least} or more",
            param_hint=hint,
        )
    return seconds
