"""The stages of a run in the terminal: those that are done, the one at hand, and those to come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.text import Text

from ringworld_jobs.units import format_tokens, parse_count
from ringworld_platform.formatting import duration, loss, mesh_heading, mesh_text, quantity
from ringworld_platform.progress import RunProgress
from ringworld_platform.run_records import Record
from ringworld_platform.text_columns import Column, lay_out

DONE, NOW, NEXT, HELD, BROKEN = "✓", "▶", "·", "■", "✗"


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage.

    Attributes:
        mark: whether it is done, at hand, to come, or was stopped or has failed.
        name: of the stage.
        context: its length.
        theta: its RoPE base.
        mesh: as ``mesh_text``.
        steps: done, of how many.
        text: the last loss.
        vision: the last loss.
        held_out: the losses on held-out rows at its end, of text and vision.
        pace: tokens a second.
        time: what it took, or what is left of it.
    """

    mark: str
    name: str
    context: str = "-"
    theta: str = "-"
    mesh: str = "-"
    steps: str = "-"
    text: str = "-"
    vision: str = "-"
    held_out: str = ""
    pace: str = "-"
    time: str = ""


def stage_lines(progress: RunProgress, width: int, rows: int | None = None) -> list[Text]:
    """A heading and a line a stage; nothing where there is no stage.

    Args:
        progress: the run.
        width: of the terminal.
        rows: most lines, the heading among them; those far from the stage at hand are summed up.
    """
    found = stage_rows(progress)
    if not found:
        return []
    left_out: list[Text] = []
    if rows is not None and len(found) + 1 > max(rows, 2):
        at = next(
            (i for i, row in enumerate(found) if row.mark not in (DONE, NEXT)), len(found) - 1
        )
        room = max(1, rows - 2)
        first = min(max(0, at - (room - 1) // 2), len(found) - room)
        before, after = first, len(found) - first - room
        found = found[first : first + room]
        told = [f"{before} before"] * bool(before) + [f"{after} to come"] * bool(after)
        left_out = [Text(f"  … {', '.join(told)}", style="dim")] if rows > 2 else []
    heads = [start.get("heads_size") for start in _of_kind(progress, "stage_start")]
    columns = [
        Column("", [row.mark for row in found]),
        Column("stage", [row.name for row in found]),
        Column("context", [row.context for row in found], right=True),
        Column("theta", [row.theta for row in found], right=True, leave=3),
        Column(mesh_heading(heads), [row.mesh for row in found], right=True, leave=2),
        Column("steps", [row.steps for row in found], right=True),
        Column("text", [row.text for row in found], right=True, leave=4),
        Column("vision", [row.vision for row in found], right=True, leave=5),
        Column("held out", [row.held_out for row in found], right=True, leave=9),
        Column("tok/s", [row.pace for row in found], right=True, leave=6),
        Column("time", [row.time for row in found], leave=1),
    ]
    styles = {DONE: "", NOW: "bold", NEXT: "dim", HELD: "bold", BROKEN: "red"}
    return lay_out(columns, width, [styles[row.mark] for row in found]) + left_out


def stage_rows(progress: RunProgress) -> list[StageRow]:
    """A row for each stage of the job, as far as the spec or the records know them.

    None for a job that trains nothing: its state says how far it is.
    """
    if progress.spec.get("kind", "train") != "train":
        return []
    planned = progress.spec.get("stages") or []
    known = int(progress.status.get("num_stages") or 0)
    total = max([len(planned), known, *(index + 1 for index in progress.stages)])
    return [_row(progress, index, planned) for index in range(total)]


def _row(progress: RunProgress, index: int, planned: list[Any]) -> StageRow:
    records = progress.stages.get(index, {})
    spec = planned[index] if index < len(planned) and isinstance(planned[index], Mapping) else {}
    start, step = records.get("stage_start", {}), records.get("step", {})
    name = str(spec.get("name") or start.get("stage") or step.get("stage") or f"stage {index + 1}")
    context = _count(start.get("context_length") or spec.get("context_length"))
    theta = spec.get("rope_theta")
    count = _count(start.get("num_steps")) or _num_steps(spec) or "?"
    done = step.get("step", start.get("step", 0))
    mark = _mark(progress, index)
    held = records.get("validation", {})
    scores = [loss(held[f"loss_{m}"]) for m in ("text", "vision") if f"loss_{m}" in held]
    return StageRow(
        mark=mark,
        name=name,
        context=format_tokens(context) if context else "-",
        theta=quantity(float(theta)) if isinstance(theta, int | float) else "-",
        mesh=_mesh(start, spec),
        steps=f"{done}/{count}",
        text=loss(step.get("loss_text")),
        vision=loss(step.get("loss_vision")),
        held_out=" ".join(scores),
        pace=quantity(step.get("tokens_per_second")),
        time=_time(progress, records, mark, done, count),
    )


def _count(value: object) -> int | None:
    """A count of the spec, which may have a unit; None where there is none."""
    try:
        return parse_count(value)
    except ValueError:
        return None


def _num_steps(spec: Mapping[str, Any]) -> int | None:
    tokens, batch = _count(spec.get("tokens")), _count(spec.get("global_batch_tokens"))
    planned = -(-tokens // batch) if tokens and batch else None
    return _count(spec.get("steps")) or planned


def _mark(progress: RunProgress, index: int) -> str:
    state, current = progress.status.get("state"), int(progress.status.get("stage_index") or 0)
    if index < current or state == "SUCCEEDED":
        return DONE
    if index > current:
        return NEXT
    if "stage_end" in progress.stages.get(index, {}) and state == "STOPPED":
        return DONE
    return {"FAILED": BROKEN, "STOPPED": HELD}.get(str(state), NOW)


def _mesh(start: Record, spec: Mapping[str, Any]) -> str:
    if start:
        return mesh_text(
            start.get("ring_size", "-"),
            start.get("heads_size"),
            start.get("data_parallel_size", "-"),
        )
    mesh = spec.get("mesh")
    if not isinstance(mesh, Mapping):
        return "-"
    return f"{mesh.get('sequence_parallel', 'auto')} x {mesh.get('data_parallel', 'auto')}"


def _time(
    progress: RunProgress, records: dict[str, Record], mark: str, done: object, count: object
) -> str:
    begin, end = records.get("begin", {}), records.get("stage_end", {})
    if begin.get("time") and end.get("time"):
        return f"took {duration(float(end['time']) - float(begin['time']))}"
    seconds = progress.recent("step_seconds")
    if mark != NOW or progress.ended or not seconds or not isinstance(count, int):
        return ""
    return f"{duration((count - int(str(done))) * median(seconds))} left"


def _of_kind(progress: RunProgress, kind: str) -> list[Record]:
    return [records[kind] for records in progress.stages.values() if kind in records]
