"""The ranks of a gang in the terminal: where each is, who holds up the others, and who waits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

from rich.text import Text

from ringworld_platform.formatting import bytes_text, duration, step_duration
from ringworld_platform.run_records import Record
from ringworld_platform.text_columns import Column, cut, lay_out

SLOWEST = 1.1
"""So much longer than the middle a rank computes that it is marked as the slowest."""
ODD_SECONDS = 5.0
"""So long in its phase, while others are elsewhere, a rank is held to be odd."""
_BAR = 6


def ring_lines(
    status: Record, width: int, rows: int | None = None, *, first: int | None = None
) -> list[Text]:
    """A line on the whole gang, a heading, and a line a rank.

    Args:
        status: of the run.
        width: of the terminal.
        rows: most lines. Of more ranks than fit, the odd ones are shown, and the rest summed up.
        first: show all ranks from this place on instead, as far as they fit.
    """
    workers = list(status.get("workers") or [])
    if not workers:
        return []
    lines = [_gang_line(status, workers, width)]
    room = len(workers) if rows is None else max(0, rows - 2)
    if room == 0:
        return lines
    notes = _notes(workers)
    shown, left_out = workers, []
    if first is not None:
        at = max(0, min(first, len(workers) - room))
        shown = workers[at : at + room]
    elif len(workers) > room:
        odd = _oddities(workers, notes)
        ranked = sorted(workers, key=lambda row: (-odd[int(row["rank"])], int(row["rank"])))
        shown, left_out = ranked[: max(0, room - 1)], ranked[max(0, room - 1) :]
        shown.sort(key=lambda row: int(row["rank"]))
    if shown:
        lines += _table(status, workers, shown, notes, width)
    if left_out:
        lines.append(_summary(left_out, width))
    return lines


def _table(
    status: Record,
    workers: Sequence[Record],
    shown: Sequence[Record],
    notes: dict[int, str],
    width: int,
) -> list[Text]:
    most = max((row.get("compute_seconds") or 0.0 for row in workers), default=0.0)
    size = int(status.get("ring_size") or 1)
    one_node = len({row.get("node") for row in workers}) == 1
    one_device = len({row.get("device") for row in workers}) == 1
    now = time.time()
    columns = [
        Column("rank", [str(row["rank"]) for row in shown], right=True),
        Column("node", ["" if one_node else str(row.get("node")) for row in shown], leave=3),
        Column("device", ["" if one_device else str(row.get("device")) for row in shown], leave=8),
        Column("step", [str(row.get("step", "-")) for row in shown], right=True),
        Column("phase", [str(row.get("phase", "-")) for row in shown]),
        Column("hop", [_hop(row, size) for row in shown], leave=5),
        Column("for", [_since(row, now) for row in shown], right=True, leave=6),
        Column("compute", [_compute(row, most) for row in shown], right=True, leave=2),
        Column("memory", [_memory(row) for row in shown], right=True, leave=7),
        Column("", [notes.get(int(row["rank"]), "") for row in shown]),
    ]
    styles = [_style(notes.get(int(row["rank"]), "")) for row in shown]
    return lay_out(columns, width, styles)


def _gang_line(status: Record, workers: Sequence[Record], width: int) -> Text:
    split = int(status.get("heads_size") or 1)
    heads = f" x heads {split}" if split > 1 else ""
    mesh = (
        f"ring {status.get('ring_size', '?')}{heads} x dp {status.get('data_parallel_size', '?')}"
    )
    nodes = {str(row.get("node")) for row in workers}
    devices = {str(row.get("device", "")).partition(":")[0] for row in workers}
    where = next(iter(nodes)) if len(nodes) == 1 else f"{len(nodes)} nodes"
    ranks = f"{len(workers)} rank{'s' if len(workers) > 1 else ''}"
    parts = [ranks, f"on {where}", "/".join(sorted(devices))]
    steps = [int(row.get("step") or 0) for row in workers]
    if max(steps) > min(steps):
        parts.append(f"at steps {min(steps)} to {max(steps)}")
    memory = [row["memory_bytes"] for row in workers if row.get("memory_bytes")]
    if memory:
        parts.append(f"memory to {bytes_text(max(memory))}")
    return cut(Text.assemble((mesh, "bold"), "  ", (", ".join(parts), "dim")), width)


def _notes(workers: Sequence[Record]) -> dict[int, str]:
    """What is to be said of some ranks; of the slow, their time to compute to the others'."""
    notes = {}
    computed = {int(r["rank"]): r["compute_seconds"] for r in workers if r.get("compute_seconds")}
    if len(computed) > 1:
        slowest = max(computed, key=lambda rank: computed[rank])
        others = median(seconds for rank, seconds in computed.items() if rank != slowest)
        if others > 0 and computed[slowest] / others >= SLOWEST:
            notes[slowest] = f"slowest, {computed[slowest] / others:.1f} x"
    behind = {int(row["rank"]) for row in workers if row.get("phase") != "boundary"}
    for row in workers:
        rank, awaited = int(row["rank"]), row.get("awaits")
        if row.get("slow"):
            notes[rank] = f"slow, {float(row['slow']):.1f} x"
        elif awaited is not None:
            notes.setdefault(rank, f"waits for {awaited}")
        elif row.get("phase") == "boundary" and behind:
            late = min(behind)
            who = str(late) if len(behind) == 1 else f"{len(behind)} ranks"
            notes.setdefault(rank, f"waits for {who}")
    return notes


def _oddities(workers: Sequence[Record], notes: dict[int, str]) -> dict[int, float]:
    """How much each rank is worth a look: the slow, those behind, those elsewhere than others."""
    newest = max(int(row.get("step") or 0) for row in workers)
    phases = Counter(row.get("phase") for row in workers)
    now = time.time()
    found = {}
    for row in workers:
        rank = int(row["rank"])
        note = notes.get(rank, "")
        odd = 8.0 * note.startswith("slow,") + 4.0 * note.startswith("slowest")
        odd += 6.0 * (int(row.get("step") or 0) < newest)
        if now - float(row.get("since") or now) > ODD_SECONDS:
            odd += 3.0 * (1 - phases[row.get("phase")] / len(workers))
        found[rank] = odd
    return found


def _summary(left_out: Sequence[Record], width: int) -> Text:
    """The ranks that are not shown, in one line."""
    doing = Counter(f"{row.get('phase')} {row.get('step')}" for row in left_out)
    told = [f"{count} in {what}" for what, count in doing.most_common(3)]
    more = len(doing) - len(told)
    told += [f"{more} more phases"] * bool(more)
    computed = sorted(row["compute_seconds"] for row in left_out if row.get("compute_seconds"))
    if computed:
        least, most = step_duration(computed[0]), step_duration(computed[-1])
        told.append(f"compute {least} to {most}")
    ranks = f"{len(left_out)} more rank{'s' if len(left_out) > 1 else ''}"
    return cut(Text(f"  … {ranks}: {', '.join(told)}", style="dim"), width)


def _hop(row: Record, size: int) -> str:
    """Which hop of the ring's round is on its way."""
    if size < 2 or row.get("phase") not in ("forward", "backward"):
        return ""
    return f"{min(int(row.get('hop') or 0) + 1, size)}/{size}"


def _since(row: Record, now: float) -> str:
    since = row.get("since")
    return duration(max(0.0, now - float(since))) if since else ""


def _compute(row: Record, most: float) -> str:
    seconds = row.get("compute_seconds")
    if not seconds:
        return ""
    return f"{step_duration(seconds)} {'━' * round(seconds / most * _BAR):<{_BAR}}"


def _memory(row: Record) -> str:
    return bytes_text(row["memory_bytes"]) if row.get("memory_bytes") else ""


def _style(note: str) -> str:
    if note.startswith("slow,"):
        return "bold yellow"
    return "yellow" if note.startswith("slowest") else ""
