"""What people see while a run goes: plain lines, live views, charts, and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ringworld_platform.charts import sparkline, squeeze
from ringworld_platform.display import (
    LiveDisplay,
    PlainDisplay,
    compact_view,
    parity_lines,
    stage_number,
)
from ringworld_platform.errors import RunConflictError
from ringworld_platform.follow import follow
from ringworld_platform.progress import RunProgress
from ringworld_platform.run_folder import Page
from ringworld_platform.run_list import ENDED_SHOWN, chosen_runs, runs_table

Recording = dict[str, Callable[..., Any]]


class ScriptedRun:
    """Answers as a controller would, moving on by ``pace`` records at each look."""

    def __init__(self, recording: Recording, pace: int = 7) -> None:
        self.all_metrics = recording["metrics"]()
        self.all_events = recording["events"]()
        self.final = recording["status"](Path("/runs/quickstart-1"))
        self.pace, self.seen, self.stopped = pace, 0, 0

    def status(self, name: str) -> dict[str, Any]:
        self.seen = min(self.seen + self.pace, len(self.all_metrics))
        if self.stopped:
            return {**self.final, "state": "STOPPED"}
        ended = self.seen == len(self.all_metrics)
        return self.final if ended else {**self.final, "state": "RUNNING", "eta_seconds": 75.0}

    def list(self) -> Any:
        return [self.status("")]

    def events(self, name: str, after: int = 0) -> Any:
        return [event for event in self.all_events if event["seq"] > after]

    def metrics(self, name: str, after: int = 0) -> Page:
        return Page(self.all_metrics[after : self.seen], max(after, self.seen))

    def logs(self, name: str, rank: int = 0, after: int = 0) -> Page:
        return Page([], after)

    def log_ends(self, name: str) -> dict[int, int]:
        return {}

    def spec(self, name: str) -> dict[str, Any]:
        return {}

    def stop(self, name: str) -> str:
        self.stopped += 1
        return name


def text_of(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_lines_tell_the_story_once(recording: Recording) -> None:
    stream = io.StringIO()
    display = PlainDisplay(Console(file=stream, width=80))
    status = follow(ScriptedRun(recording), "quickstart-1", display, poll_seconds=0.001)
    assert status["state"] == "SUCCEEDED"
    lines = stream.getvalue().splitlines()
    assert sum("rank 1 (pid 4242) died" in line for line in lines) == 1
    assert sum("held out" in line for line in lines) == 3
    steps = [line for line in lines if " step " in line and line.startswith("stage")]
    # 20 steps a stage give steps 1, 2, 4, ... 20; step 12 of the second stage was done twice.
    assert len(steps) == 3 * 11 + 1
    assert steps[0].startswith("stage 4k step 1/20  loss ")
    assert "text " in steps[0] and "vision " in steps[0] and "tokens/s" in steps[0]
    assert "1m 15s left" in steps[0]
    assert "\x1b" not in stream.getvalue()


def test_moving_counts_are_not_news(recording: Recording) -> None:
    stream = io.StringIO()
    display = PlainDisplay(Console(file=stream, width=80))
    run = ScriptedRun(recording)
    progress = RunProgress(run, "quickstart-1")
    for count in (1, 2, 3):
        progress.status = {"reason": f"preparing data: write clips {count}/3"}
        display.update(progress)
    assert stream.getvalue() == "preparing data: write clips\n"


@pytest.mark.parametrize("looks", [0, 1, 9])
def test_the_panel_of_run_shows_what_there_is(recording: Recording, looks: int) -> None:
    progress = RunProgress(ScriptedRun(recording), "quickstart-1")
    progress.status = {"run_id": "quickstart-1", "state": "QUEUED", "reason": "waits for 2 CPUs"}
    for _ in range(looks):
        progress.poll()
    text = text_of(compact_view(progress))
    assert "quickstart-1" in text
    if looks == 0:
        assert "QUEUED" in text and "waits for 2 CPUs" in text
    else:
        for expected in ("RUNNING", "16Ki tokens", "ring 2 x dp 1", "text", "vision"):
            assert expected in text, expected
        # The first look sees only steps of an earlier stage; their pace is not this one's.
        assert ("tokens/s" in text) == (looks == 9)
        assert "forward" in text and "1m 15s left" in text


def test_live_display_leaves_events_behind(recording: Recording) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True)
    display = LiveDisplay(console)
    follow(ScriptedRun(recording), "quickstart-1", display, poll_seconds=0.001)
    display.close()
    assert "rank 1 (pid 4242) died" in stream.getvalue()


class CtrlC:
    """Presses Ctrl-C at the first look, and again where asked."""

    def __init__(self, presses: int) -> None:
        self.presses, self.notes = presses, []
        self.updates = 0

    def update(self, progress: RunProgress) -> None:
        self.updates += 1
        if self.presses:
            self.presses -= 1
            os.kill(os.getpid(), signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None:
        pass


def test_ctrl_c_stops_at_a_checkpoint(recording: Recording) -> None:
    run, display = ScriptedRun(recording, pace=1), CtrlC(1)
    before = signal.getsignal(signal.SIGINT)
    status = follow(run, "quickstart-1", display, poll_seconds=0.001)
    assert (status["state"], run.stopped) == ("STOPPED", 1)
    assert len(display.notes) == 1 and "checkpoint" in display.notes[0]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_at_once(recording: Recording) -> None:
    run = ScriptedRun(recording, pace=1)
    run.stop = lambda name: name  # type: ignore[method-assign]
    display = CtrlC(2)
    with pytest.raises(KeyboardInterrupt):
        follow(run, "quickstart-1", display, poll_seconds=0.001)
    assert display.updates == 2


def test_a_run_that_ends_while_being_stopped_is_no_error(recording: Recording) -> None:
    run = ScriptedRun(recording, pace=50)

    def refuse(name: str) -> str:
        raise RunConflictError("it has ended")

    run.stop = refuse  # type: ignore[method-assign]
    assert follow(run, "quickstart-1", CtrlC(1), poll_seconds=0.001)["state"] == "SUCCEEDED"


def test_a_finished_run_is_at_its_last_stage() -> None:
    assert stage_number({"stage_index": 3, "num_stages": 3}) == "3/3"
    assert stage_number({"stage_index": 0, "num_stages": 3}) == "1/3"


def test_a_stage_that_has_proved_its_ring_says_so(recording: Recording) -> None:
    progress = RunProgress(ScriptedRun(recording, pace=1000), "quickstart-1")
    progress.poll()
    (line,) = parity_lines(progress)
    assert line.startswith("stage 8k passed: gradients off by at most 3.4e-07 of 1.0e-05 allowed")
    assert "wait 0.05s" in text_of(compact_view(progress)).replace("\N{NO-BREAK SPACE}", " ")


def test_charts() -> None:
    assert sparkline([1, 2, 3], 10) == "▁▅█"
    assert sparkline([5, 5], 10) == "▁▁"
    assert sparkline([], 10) == ""
    assert squeeze(list(range(10)), 5) == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_progress_counts_a_redone_step_once(recording: Recording) -> None:
    progress = RunProgress(ScriptedRun(recording, pace=1000), "quickstart-1")
    progress.poll()
    assert len(progress.series("loss")) == 60
    assert progress.ended
    assert threading.active_count() >= 1


def test_the_list_shows_the_line(recording: Recording) -> None:
    done = recording["status"](Path("/runs/done-1")) | {"priority": 0, "place": None}
    first = done | {
        "run_id": "first-1",
        "state": "WAITING",
        "priority": 5,
        "place": 1,
        "start_seconds": 240.0,
        "reason": "needs 2 CPU bundles of 1 CPU; 0 of 2 are free; waiting 4 min",
    }
    second = first | {"run_id": "second-1", "state": "QUEUED", "place": 2, "start_seconds": None}

    rows = text_of(runs_table([done, first, second], 160), width=160).splitlines()
    alone = text_of(runs_table([done], 160), width=160)

    headings = ["run", "state", "stage", "step", "loss", "priority", "line", "starts", "why"]
    assert rows[0].split() == headings
    assert "  5     1  in 4m 00s  needs 2 CPU bundles" in rows[2] and "waiting 4 min" in rows[2]
    assert "  5     2  ?  " in rows[3]
    assert "priority" not in alone and "starts" not in alone, "nobody waits, all are equal"


def test_a_narrow_list_cuts_neither_ids_nor_reasons() -> None:
    reason = "needs 16 GPU bundles of 8 CPUs; the largest node has 8 GPUs; 3 of 16 are free; " * 2
    long = "a-rather-long-name-of-a-job-that-somebody-has-chosen-with-care-12"
    line = {"state": "QUEUED", "reason": reason, "num_stages": 3, "loss": 2.5, "num_steps": 10**5}
    runs = [
        {**line, "run_id": "short-1", "state": "SUCCEEDED", "reason": "all 3 stages are done"},
        {**line, "run_id": "failed-1", "state": "FAILED", "error": "rank 1\nwas lost"},
        {**line, "run_id": long, "place": 1, "priority": -10, "start_seconds": 4000.0},
    ]

    shown = text_of(runs_table(runs, 80), width=80)
    piped = runs_table(runs).plain.splitlines()

    assert max(map(len, shown.splitlines())) <= 80
    assert f"\n{long}\n" in shown and " in 1h 06m\n" in shown
    assert " ".join(shown.split()).endswith(reason.strip())
    assert "done" not in shown, "that a run has succeeded says all"
    assert len(piped) == 1 + len(runs) and piped[2].endswith("rank 1 was lost")
    assert piped[3].endswith(reason.rstrip())


def test_the_list_has_the_newest_that_ended_and_the_line_last() -> None:
    ended = [{"run_id": f"old-{n}", "state": "STOPPED"} for n in range(ENDED_SHOWN + 3)]
    going = [
        {"run_id": "second", "state": "QUEUED", "place": 2},
        {"run_id": "at-work", "state": "RUNNING"},
        {"run_id": "first", "state": "WAITING", "place": 1},
    ]

    shown, left_out = chosen_runs([*ended, *going])

    names = [run["run_id"] for run in shown]
    assert names[-4:] == [f"old-{ENDED_SHOWN + 2}", "at-work", "first", "second"]
    assert (names[0], left_out) == ("old-3", 3)
    assert chosen_runs([*ended, *going], everything=True)[1] == 0
    assert chosen_runs([*ended, *going], {"STOPPED"}) == (ended, 0)
    assert chosen_runs([*ended, *going], {"RUNNING"}) == ([going[1]], 0)
