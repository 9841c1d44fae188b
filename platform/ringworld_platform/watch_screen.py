"""The screen of `ringworld watch`: as many lines as the terminal has, and none that is wider."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from ringworld_platform.display import headline, parity_lines
from ringworld_platform.event_lines import EventTable, clock, kind_style
from ringworld_platform.formatting import duration, loss, quantity, step_duration
from ringworld_platform.loss_chart import COLOURS, Span, chart
from ringworld_platform.progress import RunProgress
from ringworld_platform.ring_lines import ring_lines
from ringworld_platform.run_records import Record
from ringworld_platform.stage_lines import stage_lines
from ringworld_platform.text_columns import cut

VIEWS = ("overview", "curves", "ring", "events")
LEAST_WIDTH, LEAST_HEIGHT = 20, 6
SIDE_BY_SIDE = 72
"""Characters from which two charts stand beside each other."""
OLD_SECONDS = 60.0
"""A run that was not heard of for so long may have no controller any more."""

_SIZES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


@dataclass(slots=True)
class Look:
    """What somebody has chosen to see.

    Attributes:
        view: place in ``VIEWS``.
        scroll: lines from the top, of views that can be longer than the terminal.
        problem: why what is shown may be old.
    """

    view: int = 0
    scroll: int = 0
    problem: str = ""

    def press(self, key: str, page: int) -> bool:
        """Follow a key; False for one that leaves.

        Args:
            key: as ``Keys`` names it.
            page: lines that a page has.
        """
        if key in ("q", "Q", "\x03", "escape"):
            return False
        if key.isdecimal() and 1 <= int(key) <= len(VIEWS):
            self.view, self.scroll = int(key) - 1, 0
        elif key in ("right", "\t", "left"):
            step = -1 if key == "left" else 1
            self.view, self.scroll = (self.view + step) % len(VIEWS), 0
        else:
            by = {"down": 1, "j": 1, "up": -1, "k": -1, "pagedown": page, " ": page}
            by |= {"pageup": -page, "home": -self.scroll, "end": 1 << 30}
            self.scroll = max(0, self.scroll + by.get(key, 0))
        return True


def screen(progress: RunProgress, look: Look, width: int, height: int) -> Text:
    """The whole screen.

    Args:
        progress: the run.
        look: what to show of it; its ``scroll`` is brought into the bounds.
        width: of the terminal, in characters.
        height: of the terminal, in lines.
    """
    width, height = max(width, LEAST_WIDTH), max(height, LEAST_HEIGHT)
    head = _head(progress, look, width)[: height - 1]
    room = height - 1 - len(head)
    body = (_overview, _curves, _ring, _events)[look.view](progress, look, width, room)[:room]
    body += [Text()] * (room - len(body))
    lines = [*head, *body, _foot(progress, look, width)]
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def _head(progress: RunProgress, look: Look, width: int) -> list[Text]:
    status = progress.status
    lines = [cut(line, width) for line in headline(status).split("\n")]
    heard = time.time() - float(status.get("updated") or time.time())
    problem = f"this may be old: {look.problem}" if look.problem else ""
    if not problem and heard > OLD_SECONDS and not progress.ended:
        problem = f"not heard of for {duration(heard)}"
    if problem:
        lines.append(cut(Text(problem, style="yellow"), width))
    if status.get("state") == "FAILED" and status.get("error"):
        lines.append(cut(Text(" ".join(str(status["error"]).split()), style="red"), width))
    if status.get("num_steps"):
        lines.append(_bar(progress, width))
    if progress.steps:
        lines += _pace(progress, width)
    return lines


def _bar(progress: RunProgress, width: int) -> Text:
    status = progress.status
    done, total = int(status.get("step") or 0), max(1, int(status.get("num_steps") or 1))
    left = status.get("eta_seconds")
    behind = f"  {min(100, round(100 * done / total))} %"
    if left and not progress.ended:
        behind += f"  about {duration(left)} left in all"
    line = Text.assemble(("step ", "dim"), f"{done}/{total}  ")
    room = max(4, min(60, width - len(line) - len(behind)))
    full = min(room, done * room // total)
    line.append("━" * full, "cyan").append("─" * (room - full), "dim").append(behind, "dim")
    return cut(line, width)


def _pace(progress: RunProgress, width: int) -> list[Text]:
    """How fast it goes, and how old its newest checkpoint is: a line or two."""
    last = progress.last
    at_hand = last("stage_index") == progress.status.get("stage_index")
    parts = _speeds(progress) if at_hand or progress.ended else []
    # What would be lost stands before what is nice to know.
    parts[4:4] = [_checkpoint(progress)]
    lines, line = [], ""
    for part in filter(None, parts):
        if line and len(line) + 2 + len(part) > width:
            lines.append(line)
            line = ""
        line += f"  {part}" if line else part
    return [cut(Text(line, style="dim"), width) for line in [*lines, line][:2]]


def _speeds(progress: RunProgress) -> list[str]:
    """Of the stage at hand: a stage that is still starting has none."""
    last = progress.last
    parts = [f"{quantity(last('tokens_per_second'))} tokens/s", _utilisation(progress)]
    parts.append(f"step {step_duration(last('step_seconds') or 0.0)}")
    seconds = last("step_seconds")
    if seconds and last("ring_bytes_sent"):
        wait = (last("ring_wait_seconds") or 0.0) / seconds
        parts.append(f"ring wait {100 * wait:.0f} %")
    stall = sum(progress.recent("checkpoint_stall_seconds"))
    spent = sum(progress.recent("step_seconds"))
    if spent and stall / spent >= 0.005:
        parts.append(f"saving {100 * stall / spent:.0f} %")
    parts.append(f"gradient {loss(last('grad_norm'))}")
    parts.append(f"rate {last('learning_rate') or 0:.1e}")
    return parts


def _utilisation(progress: RunProgress) -> str:
    mfu, flops = progress.last("mfu"), progress.last("model_flops_per_second")
    if mfu is not None:
        return f"MFU {100 * mfu:.1f} %"
    if flops is None:
        return ""
    size, unit = next(((s, u) for s, u in _SIZES if flops >= s), (1.0, ""))
    return f"{flops / size:.3g} {unit}FLOP/s"


def _checkpoint(progress: RunProgress) -> str:
    record = progress.checkpoint
    if not record:
        return "no checkpoint yet"
    what = f"checkpoint of {record.get('stage')} step {record.get('step')}"
    if progress.ended or not record.get("time"):
        return what
    return f"{what}, {duration(max(0.0, time.time() - float(record['time'])))} ago"


def _overview(progress: RunProgress, look: Look, width: int, room: int) -> list[Text]:
    """Stages, ring, curves and events, each with at least its least, as many as there is room for.

    What is left over goes to those that want more, one line after another.
    """
    ranks = len(progress.status.get("workers") or [])
    stages = len(stage_lines(progress, width))
    charts = _charted(progress)
    beside = width >= SIDE_BY_SIDE
    parts: list[tuple[str, int, int]] = [("stages", min(stages, 3), stages)]
    if ranks:
        parts.append(("ring", 2 + min(ranks, 2), 2 + min(ranks, 16)))
    if charts:
        tall = 1 if beside else len(charts)
        parts.append(("curves", 5 if beside else 4, 12 * tall))
    if progress.events:
        parts.append(("events", 2, 1 + len(progress.events)))
    kept: list[tuple[str, int, int]] = []
    for part in parts:
        if sum(least for _, least, _ in kept) + part[1] <= room:
            kept.append(part)
    rows = {name: least for name, least, _ in kept}
    wants = {name: want for name, _, want in kept}
    left = room - sum(rows.values())
    while left > 0:
        hungry = [name for name in rows if rows[name] < wants[name]]
        if not hungry:
            break
        for name in hungry[:left]:
            rows[name] += 1
            left -= 1
    if "curves" in rows and left > 0:
        rows["curves"] += left
    draw: dict[str, Callable[[int], list[Text]]] = {
        "stages": lambda n: stage_lines(progress, width, n),
        "ring": lambda n: ring_lines(progress.status, width, n),
        "curves": lambda n: _charts(progress, charts, width, n),
        "events": lambda n: _event_lines(progress, width, n),
    }
    order = ("stages", "curves", "ring", "events")
    return [line for name in order if name in rows for line in draw[name](rows[name])[: rows[name]]]


def _charted(progress: RunProgress) -> list[str]:
    """The losses that there are; of a run without modalities, the loss."""
    found = [name for name in ("loss_text", "loss_vision") if progress.points(name)]
    return found or (["loss"] if progress.points("loss") else [])


def _charts(progress: RunProgress, names: Sequence[str], width: int, height: int) -> list[Text]:
    """Charts beside each other, or below each other where the terminal is narrow."""
    if width < SIDE_BY_SIDE or len(names) == 1:
        count = max(1, min(len(names), height // 4))
        each = height // count
        return [line for n in names[:count] for line in _one_chart(progress, n, width, each)]
    half = (width - 2) // 2
    left, right = (_one_chart(progress, name, half, height) for name in names[:2])
    lines = []
    for one, other in zip(left, right, strict=True):
        one.append(" " * (half + 2 - one.cell_len))
        lines.append(one + other)
    return lines


def _one_chart(progress: RunProgress, name: str, width: int, height: int) -> list[Text]:
    points = progress.points(name)
    modality = name.removeprefix("loss_")
    label = f"{modality} loss" if modality in COLOURS else name.replace("_", " ")
    colour = COLOURS.get(modality, "green")
    title = Text.assemble((label, f"bold {colour}"), f" {_figure(name, points[-1][1])}")
    marks = {}
    for records in progress.stages.values():
        held = records.get("validation", {})
        if held.get(name) is not None and math.isfinite(held[name]):
            marks[int(held.get("global_step", 0))] = float(held[name])
    if marks:
        title.append(f"  ◆ held out {loss(list(marks.values())[-1])}", "dim")
    return chart(title, points, _spans(progress), width, height, style=colour, marks=marks)


def _figure(name: str, value: float) -> str:
    return quantity(value) if name == "tokens_per_second" else loss(value)


def _spans(progress: RunProgress) -> list[Span]:
    spans = []
    for _, records in sorted(progress.stages.items()):
        begin = records.get("begin") or records.get("step") or {}
        first = int(begin.get("global_step", 0)) - int(begin.get("step", 0))
        spans.append(Span(str(begin.get("stage", "?")), first))
    return spans


def _curves(progress: RunProgress, look: Look, width: int, room: int) -> list[Text]:
    names = [*_charted(progress), "grad_norm", "tokens_per_second"]
    names = [name for name in names if progress.points(name)]
    if not names:
        return [Text("no step yet", style="dim")]
    if width < SIDE_BY_SIDE:
        return _charts(progress, names, width, room)
    pairs = [names[at : at + 2] for at in range(0, len(names), 2)][: max(1, room // 5)]
    return [line for pair in pairs for line in _charts(progress, pair, width, room // len(pairs))]


def _ring(progress: RunProgress, look: Look, width: int, room: int) -> list[Text]:
    ranks = len(progress.status.get("workers") or [])
    if not ranks:
        return [cut(Text("no workers at present", style="dim"), width)]
    look.scroll = max(0, min(look.scroll, ranks - max(1, room - 2)))
    lines = ring_lines(progress.status, width, room, first=look.scroll)
    if room > len(lines) + 1:
        lines += [Text(), *(cut(Text(line, style="dim"), width) for line in parity_lines(progress))]
    return lines


def _events(progress: RunProgress, look: Look, width: int, room: int) -> list[Text]:
    table = EventTable(width)
    events = list(reversed(progress.events))
    if not events:
        return [Text("no events yet", style="dim")]
    heading = table.heading(events)
    rows = [line for event in events for line in table.row(event).split("\n")]
    look.scroll = max(0, min(look.scroll, len(rows) - (room - 1)))
    return [cut(line, width) for line in [heading, *rows[look.scroll :]]]


def _event_lines(progress: RunProgress, width: int, rows: int) -> list[Text]:
    """A heading and the newest events, a line each."""
    events = list(progress.events)[:-rows:-1] if rows > 1 else []
    heading = Text("events, the latest first".ljust(width)[:width], style="dim underline")
    return [heading, *(_event_line(event, width) for event in events)]


def _event_line(event: Record, width: int) -> Text:
    line = Text().append(f"{clock(float(event.get('time') or 0))[6:]}  ", "dim")
    text = " ".join(str(event.get("text") or event.get("kind")).split())
    style = kind_style(event)
    kind = str(event.get("kind"))
    line.append(f"{kind:<11}  " if width >= SIDE_BY_SIDE else "", style)
    return cut(line.append(text, style if style in ("red", "yellow") else "default"), width)


def _foot(progress: RunProgress, look: Look, width: int) -> Text:
    line = Text()
    for number, name in enumerate(VIEWS):
        chosen = number == look.view
        line.append(f" {number + 1} {name} ", "reverse" if chosen else "dim")
    leave = "the run has ended; q leaves" if progress.ended else "q leaves; the job goes on"
    scrolls = "  ↑↓ scroll" if look.view in (2, 3) else ""
    if width - len(line) >= len(leave) + len(scrolls) + 2:
        line.append(f"{scrolls}  {leave}", "dim")
    elif width - len(line) >= 9:
        line.append("  q leaves", "dim")
    else:
        return cut(Text(" 1-4 views  q leaves", style="dim"), width)
    return cut(line, width)
