"""What the controller and the ranks show to Prometheus, without Ray."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mini_jobs import mini_job

from ringworld_platform import grafana_dashboard
from ringworld_platform.job_queue import JobQueue
from ringworld_platform.live_run import LiveRun, this_owner
from ringworld_platform.run_folder import RunFolder
from ringworld_platform.run_state import JobRecord, RunState, WorkerRow
from ringworld_platform.run_states import RunStates
from ringworld_platform.tally import Tally
from ringworld_platform.telemetry import Telemetry
from ringworld_platform.telemetry_table import (
    STEP_SERIES,
    Series,
    all_series,
    with_table,
)
from ringworld_workers.rank_gauges import RANK_SERIES, RankGauges
from ringworld_workers.recorder import Recorder

DOCS = Path(__file__).parents[2] / "docs"
UNITS = ("_seconds", "_bytes", "_tokens", "_steps", "_per_second", "_share", "_jobs")
WITHOUT_UNIT = (
    *("loss", "loss_text", "loss_vision", "accuracy_text", "accuracy_vision", "grad_norm", "mfu"),
    *("learning_rate", "step", "global_step", "tokens", "plan_imbalance", "ring_size", "num_steps"),
    *("data_parallel_size", "attempt", "restarts", "rank_step", "jobs", "workers"),
    *("recoveries", "events"),
)


class Sink:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.gauges: dict[tuple[str, ...], float] = {}
        self.counters: dict[tuple[str, ...], float] = {}

    def set(self, series: Series, value: float, tags: dict[str, str]) -> None:
        assert not series.counter
        self.gauges[self._key(series, tags)] = value

    def add(self, series: Series, value: float, tags: dict[str, str]) -> None:
        assert series.counter
        key = self._key(series, tags)
        self.counters[key] = self.counters.get(key, 0.0) + value

    def _key(self, series: Series, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == set(series.tags)
        return (series.name.removeprefix("ringworld_"), *(tags[name] for name in series.tags))


@dataclass
class Run:
    """As the controller's runners are."""

    live: LiveRun
    active: bool = True


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = RunFolder(tmp_path / "mini-1")
    folder.open("kind: train\n")
    record = JobRecord(
        job="mini",
        run_id="mini-1",
        num_stages=2,
        stage="1k",
        context_length=1024,
        state=RunState.RUNNING,
        run_folder=str(folder.path),
        spec_digest="d",
        owner=this_owner("me"),
    )
    return Run(LiveRun(record, mini_job(tmp_path), RunStates(tmp_path), folder))


def test_a_run_is_shown_as_long_as_it_trains_and_counted_once(
    run: Run, recording: dict[str, Callable[..., Any]]
) -> None:
    step = next(r for r in recording["metrics"]() if r["kind"] == "step")
    live, sink = run.live, Sink()
    live.states.create("mini", lambda run_id, path: live.record)
    live.record.workers = [WorkerRow(rank=0, pid=1, node="n", device="cpu")]
    telemetry = Telemetry(lambda: [run], JobQueue(lambda: None), lambda: sink)  # type: ignore[arg-type, return-value]

    live.event("failure", "rank 0 is gone")
    live.metrics([{**step, "stage": "1k", "stage_index": 0, "loss": 3.5}])
    telemetry.measure(sink)
    telemetry.measure(sink)

    at = ("mini-1", "1k")
    assert sink.gauges["loss", *at] == 3.5
    assert sink.gauges["ring_sent_bytes", *at] == step["ring_bytes_sent"]
    assert sink.gauges["context_length_tokens", *at] == 1024
    assert 0 <= sink.gauges["recovery_seconds", *at] < 60
    assert sink.gauges["jobs", "RUNNING"] == 1
    assert sink.gauges["jobs", "FAILED"] == 0
    assert 0 <= sink.gauges["lease_age_seconds",] < 60
    assert sink.counters["trained_tokens",] == 1024  # a step of 1024 tokens, and asked twice
    assert sink.counters["trained_steps",] == sink.counters["recoveries",] == 1
    assert sink.counters["events", "failure"] == 1
    assert sink.counters["controller_cpu_seconds",] > 0

    live.gang_ended()
    after = Sink()
    telemetry.measure(after)
    assert not [key for key in after.gauges if key[0] == "loss"]
    assert after.gauges["attempt", *at] == 0

    live.record.state, run.active = RunState.SUCCEEDED, False
    ended = Sink()
    telemetry.measure(ended)
    assert ended.gauges["jobs", "SUCCEEDED"] == 1
    assert not [key for key in ended.gauges if "mini-1" in key]


def test_figures_of_a_gang_before_are_forgotten(tmp_path: Path) -> None:
    seconds = 0.0
    tally = Tally(mini_job(tmp_path), clock=lambda: seconds)
    assert tally.checkpoint_age_seconds is None
    tally.hear([{"kind": "step", "stage_index": 0}, {"kind": "checkpoint", "bytes": 3}])
    seconds = 7.0
    assert tally.checkpoint_age_seconds == 7.0
    tally.event("failure")
    tally.hear([{"kind": "stage_start"}])
    assert set(tally.newest) == {"stage_start"}
    assert (tally.recovery_seconds, tally.checkpoint_age_seconds) == (None, 0.0)
    seconds = 9.5
    tally.hear([{"kind": "step", "stage_index": 0}])
    assert tally.recovery_seconds == 2.5
    counts = tally.take()
    assert (counts.steps, counts.recoveries, counts.events["failure"]) == (2, 1, 1)
    assert tally.take().steps == 0


def test_every_name_is_said_once_and_ends_in_its_unit(
    recording: dict[str, Callable[..., Any]],
) -> None:
    names = [series.name for series in all_series()]
    assert len(names) == len(set(names))
    for name in names:
        short = name.removeprefix("ringworld_")
        assert re.fullmatch(r"ringworld_[a-z_]+", name)
        assert short in WITHOUT_UNIT or short.endswith(UNITS), name
    assert all(series.meaning.isascii() for series in all_series())  # Ray takes no other text
    # Prometheus has that label itself, for what it scrapes.
    assert not [series for series in all_series() if "job" in series.tags]
    logged = next(r for r in recording["metrics"]() if r["kind"] == "step")
    # What the recorded run lacks: it says no FLOPs and no accuracy.
    others = {"mfu", "model_flops_per_second", "accuracy_text", "accuracy_vision"}
    assert {series.source for series in STEP_SERIES} - set(logged) == others


def test_the_page_has_the_table_and_the_file_has_the_dashboard() -> None:
    page = (DOCS / "observability.md").read_text(encoding="utf-8")
    remedy = "run `python -m ringworld_platform.telemetry_table docs/observability.md`"
    assert with_table(page) == page, remedy
    written = grafana_dashboard.FILE.read_text(encoding="utf-8")
    assert written == grafana_dashboard.as_json(), (
        "run `python -m ringworld_platform.grafana_dashboard`"
    )


def test_every_panel_asks_for_metrics_that_exist_by_tags_that_they_have() -> None:
    board = json.loads(grafana_dashboard.FILE.read_text(encoding="utf-8"))
    known = {series.exported: series for series in all_series()}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    shown: set[str] = set()
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel["targets"]:
            asked = re.findall(r"\bray_ringworld_[a-z_]+", target["expr"])
            assert asked, panel["title"]
            assert set(asked) <= set(known), panel["title"]
            shown |= set(asked)
            tags = {tag for name in asked for tag in known[name].tags}
            used = re.findall(r"by \(([a-z, ]+)\)", target["expr"])
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert named <= {tag for group in used for tag in group.split(", ")} <= tags
            assert ("$run" in target["expr"]) == ("run" in tags)
    (variable,) = (v for v in board["templating"]["list"] if v["name"] == "run")
    assert re.search(r"ray_ringworld_\w+", variable["definition"])[0] in known  # type: ignore[index]
    # What no panel needs: it is there for alarms and for one's own questions.
    unseen = {name.removeprefix("ray_ringworld_") for name in set(known) - shown}
    assert unseen == {
        *("accuracy_text", "accuracy_vision", "attempt", "data_parallel_size", "global_step"),
        *("model_flops_per_second", "rank_step", "ring_compute_max_seconds", "ring_size"),
        *("ring_compute_seconds", "tokens", "trained_steps_total"),
    }


def test_a_rank_shows_its_phase_and_its_memory() -> None:
    told: dict[str, tuple[float, dict[str, str]]] = {}

    @dataclass
    class Gauge:
        name: str
        text: str
        tags: tuple[str, ...]

        def set(self, value: float, tags: dict[str, str]) -> None:
            told[self.name] = value, tags

    recorder = Recorder()
    recorder.phase("forward", 7)
    memory = {"memory_host_bytes": 5, "memory_device_bytes": 0}
    tags = {"run": "mini-1", "stage": "1k", "rank": "3"}
    gauges = RankGauges(Gauge, recorder, lambda: memory, tags, 1e9)

    gauges.set()
    assert told["ringworld_rank_step"] == (7.0, tags)
    assert 0 <= told["ringworld_rank_phase_seconds"][0] < 60
    assert set(RANK_SERIES) - set(told) == {"ringworld_rank_memory_device_bytes"}

    memory["memory_device_bytes"] = 9
    gauges.start()  # sets them once, at once
    deadline = time.monotonic() + 60
    while "ringworld_rank_memory_device_bytes" not in told:
        assert time.monotonic() < deadline
        time.sleep(0.01)
