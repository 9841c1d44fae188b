"""The report of a recorded run: figures, plots and one self-contained HTML file."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ringworld_platform.curves import curves_of, running_mean
from ringworld_platform.display import PlainDisplay, compact_view
from ringworld_platform.formatting import bytes_text, duration, quantity
from ringworld_platform.plots import write_plots
from ringworld_platform.progress import RunProgress
from ringworld_platform.proofs import is_proved, keep_proof, read_proofs
from ringworld_platform.report import build_report, render_terminal, write_report
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_records import read_lines, read_run
from ringworld_platform.run_view import FolderView
from ringworld_platform.watch_screen import VIEWS, Look, screen

Recording = dict[str, Callable[..., Any]]


def test_each_stage_is_summed_up(recorded_run: Path, recording: Recording) -> None:
    report = build_report(recorded_run)
    assert [stage.name for stage in report.stages] == ["4k", "8k", "16k"]
    assert [stage.context for stage in report.stages] == ["4Ki", "8Ki", "16Ki"]
    assert [(s.ring_size, s.data_parallel_size) for s in report.stages] == [(1, 1), (2, 1), (2, 1)]
    assert [stage.steps for stage in report.stages] == [20, 20, 20]
    assert [stage.attempts for stage in report.stages] == [1, 2, 1]
    assert report.tokens == 60 * 16384
    assert report.restarts == 1
    assert report.stages[1].checkpoint == "01-8k/step-00000020"
    assert report.stages[1].wall_seconds == pytest.approx(13 + 10)  # the 8 s outage left out

    steps = [r for r in recording["metrics"]() if r["kind"] == "step" and r["stage_index"] == 0]
    text = report.stages[0].modalities[0]
    assert text.modality == "text"
    assert text.first == pytest.approx(np.mean([step["loss_text"] for step in steps[:3]]))
    assert text.last == pytest.approx(np.mean([step["loss_text"] for step in steps[-3:]]))
    assert (text.validation, text.baseline, text.beats_guessing) == (3.1, 6.4, True)


def test_of_a_redone_step_the_last_counts(recorded_run: Path) -> None:
    redone = [s for s in read_run(recorded_run).steps() if s["stage_index"] == 1]
    assert [step["step"] for step in redone] == list(range(1, 21))
    assert {step["attempt"] for step in redone[:10]} == {1}
    assert {step["attempt"] for step in redone[10:]} == {2}


class Resources(HTMLParser):
    """Collects what a page would load, and what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_html_needs_nothing_else(recorded_run: Path) -> None:
    text = write_report(recorded_run).read_text()
    page = Resources()
    page.feed(text)
    assert len(page.sources) == 9
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & page.tags
    assert not re.search(r"url\(|@import", text)
    names = ("loss", "position", "learning_rate", "grad_norm", "throughput", "step_time", "ring")
    for name in (*names, "memory"):
        assert (recorded_run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_proofs_of_parity_are_shown(recorded_run: Path) -> None:
    assert "Parity" not in write_report(recorded_run).read_text()
    ring = {
        "packing": "packed",
        "precision": "fp32",
        "ring_size": 2,
        "heads_size": 1,
        "layout": "zigzag",
        "backend": "cpu",
        "why": "<b>least cost</b>",
        "loss_difference": 0.0,
        "grad_norm_difference": None,
        "worst_error": 0.25,
        "worst_limit": 1e-5,
        "worst_parameter": "layers.0.attention.k_proj.weight",
        "passed": False,
    }
    proof = {"stage": "8k", "passed": False, "seconds": 4.2, "rings": [ring]}
    folder = RunFolder(recorded_run)
    folder.append_metrics([{"kind": "parity", "stage": "8k", "report": proof}])
    folder.close()
    assert "report" not in read_run(recorded_run).of_kind("parity")[-1]
    keep_proof(recorded_run, "command", proof | {"stage": "16k", "passed": True})
    assert {k: list(v) for k, v in read_proofs(recorded_run).items()} == {
        "8k": ["preflight"],
        "16k": ["command"],
    }
    assert json.loads((recorded_run / "parity.json").read_text())["passed"] is False
    text = write_report(recorded_run).read_text()
    for words in ("<h2>Parity</h2>", "before training", "2.5e-01", "by hand", "FAIL"):
        assert words in text, words
    assert "<b>least cost" not in text
    assert "the ring of 8k does NOT give" in text


def test_a_proof_holds_for_its_mesh(tmp_path: Path) -> None:
    mesh = {"ring_size": 2, "heads_size": 1, "data_parallel_size": 1, "device": "cpu"}
    assert not is_proved(tmp_path, "4k", mesh)
    keep_proof(tmp_path, "preflight", {"stage": "4k", "passed": True, "mesh": mesh})
    assert is_proved(tmp_path, "4k", mesh)
    assert not is_proved(tmp_path, "4k", mesh | {"ring_size": 4})
    assert not is_proved(tmp_path, "8k", mesh)
    keep_proof(tmp_path, "preflight", {"stage": "4k", "passed": False, "mesh": mesh})
    assert not is_proved(tmp_path, "4k", mesh)
    (tmp_path / "parity.json").write_text("{")
    assert not is_proved(tmp_path, "4k", mesh)


def test_the_html_escapes_what_comes_from_outside(recorded_run: Path) -> None:
    state = json.loads((recorded_run / "state.json").read_text())
    state |= {"state": "FAILED", "error": "<script>alert(1)</script>"}
    (recorded_run / "state.json").write_text(json.dumps(state))
    text = write_report(recorded_run).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_run_that_only_began_has_a_report(recorded_run: Path) -> None:
    (recorded_run / "metrics.jsonl").unlink()
    report = build_report(recorded_run)
    assert [stage.context_length for stage in report.stages] == [4096, 8192, 16384]
    assert [stage.num_steps for stage in report.stages] == [20, 20, 20]
    assert "not begun" in write_report(recorded_run).read_text()


def test_text_only_runs_show_text_only(recorded_run: Path, recording: Recording) -> None:
    records = [
        {key: value for key, value in record.items() if "vision" not in key}
        for record in recording["metrics"]()
    ]
    (recorded_run / "metrics.jsonl").unlink()
    recording["append"](recorded_run / "metrics.jsonl", records)
    report = build_report(recorded_run)
    assert {r.modality for stage in report.stages for r in stage.modalities} == {"text"}
    assert "loss" in {plot.name for plot in write_plots(report.run)}


def test_a_figure_that_was_no_number_is_left_out(recorded_run: Path, recording: Recording) -> None:
    records = recording["metrics"]()
    last = max(r["step"] for r in records if r["kind"] == "step" and r["stage_index"] == 0)
    for record in records:
        scored = record["kind"] == "validation" and record["stage_index"] == 1
        if scored or (record["kind"] == "step" and record["step"] == last):
            record |= {name: None for name in record if name.startswith("loss")}
            record |= {"tokens_per_second": None}
    (recorded_run / "metrics.jsonl").unlink()
    recording["append"](recorded_run / "metrics.jsonl", records)
    report = build_report(recorded_run)
    second = next(r for r in report.stages[1].modalities if r.modality == "text")
    assert second.validation is None and math.isfinite(second.last)
    assert {"loss", "position"} <= {plot.name for plot in write_plots(report.run)}
    progress = RunProgress(FolderView(recorded_run.parent), recorded_run.name)
    progress.poll()
    assert math.isnan(progress.last("loss") or 0.0)
    assert max(dict(progress.points("loss"))) < max(dict(progress.points("step_seconds")))
    console = Console(width=100, file=io.StringIO())
    console.print(compact_view(progress))
    for view in range(len(VIEWS)):
        console.print(screen(progress, Look(view), 100, 40))
    display = PlainDisplay(console)
    display.update(progress)


def test_the_terminal_table_fits_80_columns(recorded_run: Path) -> None:
    console = Console(width=80, record=True, force_terminal=False, file=open("/dev/null", "w"))
    console.print(render_terminal(build_report(recorded_run)))
    text = console.export_text()
    assert "…" not in text
    assert "8Ki" in text and "held out" in text and "8k (2 attempts)" in text
    last = build_report(recorded_run).stages[-1].checkpoint
    assert last and f"{last}." in text.replace("\n", "")


def test_running_mean_is_centred_and_skips_gaps() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    assert running_mean(values, 3) == pytest.approx([1.5, 1.5, 3.0, 4.5, 4.5])
    assert running_mean(values[:2], 9) == pytest.approx([1.5, 1.5])
    assert np.isnan(running_mean(np.array([np.nan]), 3)).all()


def test_stage_spans_cover_the_tokens(recorded_run: Path) -> None:
    spans = curves_of(read_run(recorded_run)).spans
    assert [span.label for span in spans] == ["4k: 4Ki", "8k: 8Ki", "16k: 16Ki"]
    assert [span.first for span in spans] == [0, 20 * 16384, 40 * 16384]
    assert spans[-1].last == 60 * 16384


def test_held_out_losses_by_position_are_told_apart_by_stage(
    recorded_run: Path, recording: Recording
) -> None:
    curves = curves_of(read_run(recorded_run))
    text = {span.name: losses for span, losses in curves.by_position("text").items()}
    assert {name: list(losses) for name, losses in text.items()} == {
        "4k": [0, 256, 512, 1024, 2048],
        "8k": [0, 256, 512, 1024, 2048, 4096],
        "16k": [0, 256, 512, 1024, 2048, 4096, 8192],
    }
    assert text["16k"][256] == pytest.approx(2.9)
    assert curves.by_position("caption") == {}
    plain = [{k: v for k, v in r.items() if "_from_" not in k} for r in recording["metrics"]()]
    (recorded_run / "metrics.jsonl").unlink()
    recording["append"](recorded_run / "metrics.jsonl", plain)
    assert "position" not in {plot.name for plot in write_plots(read_run(recorded_run))}


def test_reading_goes_on_where_it_ended(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_lines(log).records == []
    log.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    first = read_lines(log)
    assert [record["a"] for record in first.records] == [1, 2]
    with log.open("a") as file:
        file.write(": 3}\nnonsense\n[1]\n")
    second = read_lines(log, first.offset)
    assert ([record["a"] for record in second.records], second.broken) == ([3], 2)
    long_line = json.dumps({"a": "x" * 100})
    log.write_text(f"{long_line}\n{long_line}\n")
    part = read_lines(log, 0, limit_bytes=10)
    assert (len(part.records), part.offset) == (1, len(long_line) + 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (59.7, "1m 00s"),
        (3600, "1h 00m"),
        (9e5, "10d 10h"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_quantities() -> None:
    assert [quantity(v) for v in (None, 0.5, 999, 12_345, 4.8e9)] == [
        "-",
        "0.5",
        "999",
        "12.3k",
        "4.8B",
    ]
    assert [bytes_text(v) for v in (None, 512, 3 << 30)] == ["-", "512 B", "3.0 GiB"]
