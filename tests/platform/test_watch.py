"""The screen of `ringworld watch`: what it shows, and that it fits whatever terminal there is."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from ringworld_platform import head
from ringworld_platform.charts import curve_over
from ringworld_platform.cli import app
from ringworld_platform.event_lines import EventTable, since_when
from ringworld_platform.keys import decode_keys
from ringworld_platform.loss_chart import Span, chart
from ringworld_platform.progress import KEPT_STEPS, RunProgress
from ringworld_platform.ring_lines import ring_lines
from ringworld_platform.run_view import FolderView
from ringworld_platform.stage_lines import stage_lines
from ringworld_platform.watch_screen import VIEWS, Look, screen

RUN = "quickstart-1"


def progress_of(folder: Path, **status: Any) -> RunProgress:
    """The recorded run as watch sees it; with fields of its state changed."""
    state = folder / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **status}))
    progress = RunProgress(FolderView(folder.parent), folder.name)
    progress.poll()
    return progress


def lines_of(progress: RunProgress, view: str = "overview", width: int = 80, height: int = 24):  # type: ignore[no-untyped-def]
    shown = screen(progress, Look(VIEWS.index(view)), width, height)
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == height, (view, width, height)
    assert max(line.cell_len for line in shown.split("\n")) <= width
    return lines


def workers(count: int, **more: Any) -> list[dict[str, Any]]:
    now = time.time()
    return [
        {
            "rank": rank,
            "pid": 40 + rank,
            "node": f"10.0.0.{rank // 8}",
            "device": f"cuda:{rank % 8}",
            "phase": "forward",
            "step": 13,
            "since": now - 2,
            "hop": 1,
            "memory_bytes": 60 << 30,
            "compute_seconds": 1.0,
            **more,
        }
        for rank in range(count)
    ]


OWNER = {"controller": "c", "host": "elsewhere", "pid": 1, "beat": 4e9}
"""Beats for longer than any test."""
RUNNING = {"state": "RUNNING", "eta_seconds": 75.0, "step": 13, "updated": 4e9, "owner": OWNER}


@pytest.mark.parametrize(
    ("size", "ranks"),
    [
        *(((80, 24), ranks) for ranks in (0, 2, 64)),
        *(((20, 12), 0), ((20, 6), 1000), ((47, 11), 64), ((120, 40), 2), ((200, 60), 1000)),
    ],
)
def test_every_view_fits(recorded_run: Path, size: tuple[int, int], ranks: int) -> None:
    progress = progress_of(recorded_run, **RUNNING, workers=workers(ranks))
    for view in VIEWS:
        lines = lines_of(progress, view, *size)
        assert lines[0].startswith(RUN)
        assert "q leaves" in lines[-1]


def test_the_overview_has_it_all_in_80_columns(recorded_run: Path) -> None:
    ranks = workers(2)
    ranks[1] |= {"awaits": 0, "phase": "backward", "hop": 0}
    ranks[0] |= {"compute_seconds": 1.5, "phase": "checkpoint"}
    progress = progress_of(recorded_run, **RUNNING, workers=ranks)
    lines = lines_of(progress)
    text = "\n".join(lines)
    assert "RUNNING  stage 16k (3/3)  16Ki tokens  ring 2 x dp 1  attempt 2" in lines[0]
    assert re.search(r"step 13/20 .*65 % .*about 1m 15s left in all", text)
    assert "tokens/s" in text and "checkpoint of 16k step 20, " in text
    stages = [line for line in lines if re.match(r"[✓▶·] ", line)]
    assert [line.split()[:2] for line in stages] == [["✓", "4k"], ["✓", "8k"], ["▶", "16k"]]
    assert "1M" in stages[0] and "10M" in stages[2] and "2 x 1  20/20" in stages[1]
    assert stages[1].endswith("took 31s"), "the time of its first attempt too"
    assert "text loss" in text and "vision loss" in text and "◆ held out 2.700" in text
    assert re.search(r"└4k─+┴8k─+┴16k", text)
    first, second = (line for line in lines if re.match(r" +[01] +13 ", line))
    assert "checkpoint" in first and "1.50s ━━━━━━" in first and "60.0 GiB" in first
    assert first.endswith("slowest, 1.5 x")
    assert "backward" in second and "1/2" in second and second.endswith("waits for 0")
    assert "ring 2 x dp 1  2 ranks, on 10.0.0.0, cuda, memory to 60.0 GiB" in text
    events = [line for line in lines if re.match(r"\d\d:\d\d:\d\d  ", line)]
    assert "recovered" in events[0] and "worker_lost" in events[1]


def test_stages_to_come_are_known_from_the_spec(recorded_run: Path) -> None:
    metrics = recorded_run / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["stage"] == "4k"]
    last = json.loads(kept[7])
    del last["loss_vision"]  # its rows were all of text
    metrics.write_text("\n".join([*kept[:7], json.dumps(last)]) + '\n{"kind": "step", "torn')
    progress = progress_of(recorded_run, **RUNNING | {"stage_index": 0, "stage": "4k", "step": 7})
    lines = [line.plain.split() for line in stage_lines(progress, 100)]
    assert lines[1][:6] == ["▶", "4k", "4Ki", "1M", "1", "x"] and lines[1][-1] == "left"
    assert "-" not in lines[1], "the losses of the last steps that had any"
    assert lines[3] == ["·", "16k", "16Ki", "10M", "2", "x", "1", "0/20", "-", "-", "-"]
    short = [line.plain for line in stage_lines(progress, 100, 3)]
    assert len(short) == 3 and short[1].startswith("▶  4k") and short[2] == "  … 2 to come"
    failed = progress_of(
        recorded_run, **RUNNING | {"state": "FAILED", "error": "no\nroom", "stage_index": 1}
    )
    assert "✗  8k" in "\n".join(lines_of(failed)) and "no room" in "\n".join(lines_of(failed))


def test_a_mesh_that_splits_heads_shows_them(recorded_run: Path) -> None:
    log = recorded_run / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        if record["kind"] == "stage_start" and record["stage_index"] == 2:
            record["heads_size"] = 4
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    progress = progress_of(recorded_run, **RUNNING, heads_size=4, workers=workers(8))
    shown = " ".join(" ".join(lines_of(progress, width=120, height=40)).split())
    assert "ring 2 x heads 4 x dp 1 8 ranks" in shown and "ring x heads x dp" in shown
    assert "16Ki 10M 2 x 4 x 1 20/20" in shown and "8Ki 5M 2 x 1 20/20" in shown


def test_of_many_ranks_the_odd_ones_are_shown() -> None:
    ranks = workers(1000)
    ranks[700] |= {"slow": 2.4, "compute_seconds": 2.4}
    ranks[42] |= {"step": 12}
    ranks[7] |= {"phase": "data", "since": time.time() - 300}
    status = {"workers": ranks, "ring_size": 8, "data_parallel_size": 125}
    began = time.monotonic()
    lines = [line.plain for line in ring_lines(status, 100, 7)]
    assert time.monotonic() - began < 10
    assert len(lines) == 7
    assert lines[0].startswith("ring 8 x dp 125  1000 ranks, on 125 nodes, cuda, at steps 12 to 13")
    assert [int(line.split()[0]) for line in lines[2:6]] == [0, 7, 42, 700]
    assert "5m 00s" in lines[3] and lines[5].endswith("slow, 2.4 x")
    assert lines[6] == "  … 996 more ranks: 996 in forward 13, compute 1.00s to 1.00s"
    whole = [line.plain for line in ring_lines(status, 100, 7, first=998)]
    assert [int(line.split()[0]) for line in whole[2:]] == [995, 996, 997, 998, 999]
    assert ring_lines({"workers": []}, 80) == []


def test_ranks_that_are_done_wait_for_those_that_are_not() -> None:
    ranks = workers(3, phase="boundary", compute_seconds=None, memory_bytes=None)
    ranks[1] |= {"phase": "optimizer"}
    lines = [line.plain for line in ring_lines({"workers": ranks, "ring_size": 3}, 80)]
    assert [line.endswith("waits for 1") for line in lines[2:]] == [True, False, True]


def test_a_long_run_is_kept_whole_and_small(recorded_run: Path) -> None:
    with (recorded_run / "metrics.jsonl").open("w") as file:
        for step in range(1, 3 * KEPT_STEPS):
            record = {"kind": "step", "stage_index": 0, "step": step, "global_step": step}
            loss = float("nan") if step == 5 else 9 - step / KEPT_STEPS
            file.write(json.dumps({**record, "loss": loss}) + "\n")
    progress = progress_of(recorded_run)
    points = progress.points("loss")
    assert points[0][0] < 100 and points[-1] == (3 * KEPT_STEPS - 1, pytest.approx(6, abs=0.01))
    assert len(progress.steps) <= KEPT_STEPS and all(value == value for _, value in points)
    assert "\nloss 6.000" in "\n".join(lines_of(progress))


def test_a_held_out_loss_that_is_no_number_is_not_drawn(recorded_run: Path) -> None:
    log = recorded_run / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    broken = [{**r, "loss_text": float("nan")} for r in records if r["kind"] == "validation"]
    log.write_text("".join(json.dumps(record) + "\n" for record in [*records, broken[-1]]))
    text = "\n".join(lines_of(progress_of(recorded_run), "curves"))
    assert re.search(r"text loss.*◆ held out 2.900", text), "that of the stage before"


def test_charts_stand_on_their_axes() -> None:
    falling = curve_over([(x, 8.0 - x) for x in range(8)], (0, 8), (1, 8), 4, 2)
    assert [len(row) for row in falling] == [4, 4]
    assert falling[0][0] != "\u2800" and falling[0][3] == "\u2800" and falling[1][3] != "\u2800"
    assert curve_over([], (0, 1), (0, 1), 3, 1) == ["\u2800" * 3]
    points = [(step, 100.0 if step == 1 else 3.0 + 1 / step) for step in range(1, 101)]
    spans = [Span("a", 0), Span("long-name", 50)]
    lines = chart(Text("t"), points, spans, 40, 6, marks={50: 3.2})
    plain = [line.plain for line in lines]
    assert [len(line) <= 40 for line in plain] == [True] * 6
    assert plain[1].startswith("  3.33 ┤"), "a spike does not flatten all the others"
    assert plain[4].startswith("  3.01 ┤") and plain[5].endswith(
        "└a" + "─" * 15 + "┴long-name──────"
    )
    assert sum("◆" in line for line in plain) == 1
    flat = chart(Text("t"), [(1, 2.0)], [], 12, 4)
    assert len(flat) == 4


def test_events_fit_the_terminal() -> None:
    long = {"time": 1.0, "kind": "state", "text": "word " * 30, "stage": "a-stage-of-a-long-name"}
    for width in (80, 60, 30):
        table = EventTable(width)
        lines = str(table.heading([long])).splitlines() + str(table.row(long)).splitlines()
        assert len(lines) > 2
        assert width < 60 or max(map(len, lines)) <= width
    assert "\n" not in str(EventTable().row(long))
    assert since_when("10m", 1000.0) == since_when("10min", 1000.0) == 400.0
    noon = time.mktime((2026, 11, 22, 12, 0, 0, 0, 0, -1))
    assert since_when("11:30", noon) == noon - 1800
    assert since_when("12:30", noon) == noon + 1800 - 86_400
    assert since_when("2026-11-22T11:00", noon) == noon - 3600


def test_keys_and_what_they_do() -> None:
    assert decode_keys("q\x1b[A\x1bOB\x1b[5~2\x1b[99z\x1b") == [
        *("q", "up", "down", "pageup", "2", "escape")
    ]
    look = Look()
    for key, view in (("3", 2), ("right", 3), ("right", 0), ("left", 3), ("9", 3), ("\u00b2", 3)):
        assert look.press(key, 10) and look.view == view
    for key, scroll in (("down", 1), ("pagedown", 11), ("up", 10), ("home", 0), ("up", 0)):
        assert look.press(key, 10) and look.scroll == scroll
    assert not look.press("q", 10)


def test_scrolling_stops_at_the_end(recorded_run: Path) -> None:
    progress = progress_of(recorded_run, **RUNNING, workers=workers(64))
    look = Look(view=2)
    look.press("end", 10)
    last = str(screen(progress, look, 80, 24))
    assert re.search(r"\n +63  10\.0", last) and look.scroll < 64


def in_terminal(arguments: list[str], folder: Path, keys: bytes, want: bytes) -> tuple[int, bytes]:
    """Run a command in a real terminal of 80 x 24; press keys once ``want`` is on it."""
    import fcntl
    import pty
    import struct
    import termios

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm-256color", "HOME": str(folder)}
        os.environ.pop("RAY_ADDRESS", None)
        code = "from ringworld_platform.cli import main; main()"
        os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    seen, pressed = b"", False
    try:
        while True:
            try:
                data = os.read(terminal, 65536)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                data = b""
            if not data:
                break
            seen += data
            if want in seen and not pressed:
                pressed = True
                os.write(terminal, keys)
    finally:
        os.close(terminal)
        if not pressed:
            os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


@pytest.mark.timeout(120)
@pytest.mark.parametrize("keys", [b"2q", b"\x03"])
def test_leaving_a_terminal_leaves_the_job_alone(recorded_run: Path, keys: bytes) -> None:
    progress_of(recorded_run, **RUNNING)
    before = (recorded_run / "state.json").read_bytes()
    arguments = ["watch", "--runs", str(recorded_run.parent)]
    code, seen = in_terminal(arguments, recorded_run.parent, keys, b"q leaves")
    assert code == 0, seen
    assert b"left quickstart-1, which is RUNNING and goes on" in seen
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen, "the screen is given back"
    assert (recorded_run / "state.json").read_bytes() == before


def test_a_picture(recorded_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "find_running", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    picture = tmp_path / "pictures" / "watch.svg"
    command = ["watch", "--runs", str(recorded_run.parent), "--svg", str(picture)]
    done = CliRunner().invoke(app, [*command, "--view", "curves"])
    assert done.exit_code == 0, done.output
    drawn = picture.read_text()
    assert drawn.startswith("<svg") and "held" in drawn
    assert drawn.count("://") == 1, "a picture fetches nothing"
    assert "there are overview" in CliRunner().invoke(app, [*command, "--view", "x"]).output
    assert "write 100x32" in CliRunner().invoke(app, [*command, "--size", "9"]).output


@pytest.mark.timeout(120)
def test_plain_lines_can_be_left_too(recorded_run: Path, tmp_path: Path) -> None:
    progress_of(recorded_run, **RUNNING)
    code = "from ringworld_platform.cli import main; main()"
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    watching = subprocess.Popen(
        [sys.executable, "-c", code, "watch", "--runs", str(recorded_run.parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert watching.stdout is not None
    for line in watching.stdout:
        if line.startswith("stage 16k step 20/20"):
            watching.send_signal(signal.SIGINT)
            break
    _, said = watching.communicate(timeout=100)
    assert watching.returncode == 0 and "left quickstart-1, which is RUNNING and goes on" in said
