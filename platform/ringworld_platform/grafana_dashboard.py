"""The Grafana dashboard: which panels it has, and what each asks Prometheus.

    python -m ringworld_platform.grafana_dashboard

writes it to ``deploy/grafana/dashboards/ringworld.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "deploy" / "grafana" / "dashboards" / "ringworld.json"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 24, 8
_RUN = 'run=~"$run"'


@dataclass(frozen=True, slots=True)
class Query:
    """What a panel asks.

    Attributes:
        expression: of Prometheus.
        legend: of its lines; Grafana fills in ``{{label}}``.
    """

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel.

    Attributes:
        title: what it shows.
        queries: at least one.
        unit: Grafana's name of it.
        help: what to read from it.
        width: of 24 columns.
        stacked: lines on one another.
        log: a logarithmic axis.
        number: a big number for each line, instead of a curve.
        most: end of the axis.
    """

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    help: str = ""
    width: int = 8
    stacked: bool = False
    log: bool = False
    number: bool = False
    most: float | None = None


def _stage(name: str, legend: str = "{{run}} {{stage}}") -> Query:
    # A controller that was started again is another process to Ray: one line all the same.
    return Query(f"max by (run, stage) (ray_ringworld_{name}{{{_RUN}}})", legend)


def _rank(name: str) -> Query:
    expression = f"max by (run, stage, rank) (ray_ringworld_rank_{name}{{{_RUN}}})"
    return Query(expression, "{{run}} {{stage}} rank {{rank}}")


def _split(*names: str) -> list[Query]:
    return [_stage(f"{name}_seconds", f"{{{{run}}}} {name.replace('_', ' ')}") for name in names]


ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "All jobs",
        (
            Panel("Runs", [Query("max by (state) (ray_ringworld_jobs) > 0", "{{state}}")],
                  number=True),
            Panel("Workers that train", [Query("max(ray_ringworld_workers)", "workers")],
                  number=True, width=4),
            Panel("Runs in the line", [Query("max(ray_ringworld_waiting_jobs)", "waiting")],
                  number=True, width=4),
            Panel("Tokens of all runs",
                  [Query("sum(rate(ray_ringworld_trained_tokens_total[$__rate_interval]))",
                         "tokens/s")],
                  number=True, width=4),
            Panel("Recoveries",
                  [Query("sum(increase(ray_ringworld_recoveries_total[$__range]))",
                         "in this time")],
                  number=True, width=4,
                  help="Failures after which a run has made steps again."),
        ),
    ),
    (
        "Learning",
        (
            Panel("Loss", [_stage("loss")], log=True),
            Panel("Loss by modality",
                  [_stage("loss_text", "{{run}} {{stage}} text"),
                   _stage("loss_vision", "{{run}} {{stage}} vision")], log=True),
            Panel("Gradient norm, before clipping", [_stage("grad_norm")], log=True),
            Panel("Learning rate", [_stage("learning_rate")], "sci"),
            Panel("Context length", [_stage("context_length_tokens")], log=True),
            Panel("Steps done, of the stage's",
                  [Query(f"max by (run, stage) (ray_ringworld_step{{{_RUN}}}) / "
                         f"max by (run, stage) (ray_ringworld_num_steps{{{_RUN}}})",
                         "{{run}} {{stage}}")], "percentunit", most=1.0),
        ),
    ),
    (
        "Speed",
        (
            Panel("Tokens per second", [_stage("tokens_per_second")]),
            Panel("MFU", [_stage("mfu")], "percentunit",
                  help="Model FLOPs (visible pairs only) to the GPUs' bf16 peak; none on CPU."),
            Panel("Time left", [_stage("eta_seconds")], "s"),
            Panel("What a step is made of",
                  _split("data", "forward", "backward", "optimizer", "checkpoint_stall"),
                  "s", width=12, stacked=True,
                  help="Rank 0's. The ring's waiting is within forward and backward."),
            Panel("Waiting for the ring, of a step",
                  [Query(f"max by (run, stage) (ray_ringworld_ring_wait_{kind}seconds{{{_RUN}}}) / "
                         f"max by (run, stage) (ray_ringworld_step_seconds{{{_RUN}}})",
                         f"{{{{run}}}} {{{{stage}}}} {legend}")
                   for kind, legend in (("", "mean"), ("max_", "most"))],
                  "percentunit", width=12,
                  help="Communication that compute does not hide."),
            Panel("Padding", [_stage("padding_share")], "percentunit",
                  help="Positions that hold no document."),
            Panel("Imbalance of the plan", [_stage("plan_imbalance")],
                  help="Attention's work on the busiest rank to the mean: 1 is best."),
            Panel("Sent around the ring in a step", [_stage("ring_sent_bytes")], "bytes"),
        ),
    ),
    (
        "Ranks",
        (
            Panel("Time in the present phase", [_rank("phase_seconds")], "s",
                  help="One that grows and grows is a stall."),
            Panel("GPU memory, most in use", [_rank("memory_device_bytes")], "bytes"),
            Panel("Host memory", [_rank("memory_host_bytes")], "bytes"),
        ),
    ),
    (
        "Safety",
        (
            Panel("Age of the newest checkpoint", [_stage("checkpoint_age_seconds")], "s",
                  help="What a crash now would cost."),
            Panel("Checkpoints: upload and stall",
                  [_stage("checkpoint_seconds", "{{run}} {{stage}} upload"),
                   _stage("checkpoint_snapshot_seconds", "{{run}} {{stage}} stall")], "s"),
            Panel("Size of a checkpoint", [_stage("checkpoint_bytes")], "bytes"),
            Panel("Events",
                  [Query("sum by (kind) (increase(ray_ringworld_events_total[$__rate_interval]))",
                         "{{kind}}")], width=12, stacked=True),
            Panel("From failure to the next step", [_stage("recovery_seconds")], "s", width=6),
            Panel("Restarts since the newest checkpoint", [_stage("restarts")], width=6,
                  help="recovery.max_restarts is the budget."),
            Panel("CPU of the controller",
                  [Query("sum(rate(ray_ringworld_controller_cpu_seconds_total[$__rate_interval]))",
                         "of a core")], "percentunit"),
            Panel("Memory of the controller",
                  [Query("max(ray_ringworld_controller_memory_bytes)", "resident")], "bytes"),
            Panel("Age of the lease", [Query("max(ray_ringworld_lease_age_seconds)", "oldest")],
                  "s", help="At 30 s another controller may take the run."),
        ),
    ),
)  # fmt: skip
"""Titles of rows, and their panels."""


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        place = {"h": 1, "w": _WIDTH, "x": 0, "y": y}
        number = len(panels) + 1
        panels.append(
            {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place}
            | {"panels": []}
        )
        y += 1
        x = 0
        for panel in row:
            height = _HEIGHT // 2 if panel.number else _HEIGHT
            if x + panel.width > _WIDTH:
                x, y = 0, y + height
            place = {"h": height, "w": panel.width, "x": x, "y": y}
            panels.append(_panel(panel, len(panels) + 1, place))
            x += panel.width
        y += height
    return {
        "uid": "ringworld",
        "title": "Ringworld",
        "tags": ["ringworld"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource"}
    asked = "label_values(ray_ringworld_attempt, run)"
    return [
        {**source, "query": "prometheus", "hide": 0, "refresh": 1},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": _DATASOURCE,
            "definition": asked,
            "query": {"query": asked, "refId": "run"},
            "refresh": 2,
            "sort": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "hide": 0,
        },
    ]


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    curve: dict[str, Any] = {"drawStyle": "line", "lineWidth": 1, "showPoints": "never"}
    if panel.stacked:
        curve |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 30}
    if panel.log:
        curve |= {"scaleDistribution": {"type": "log", "log": 2}}
    defaults: dict[str, Any] = {"unit": panel.unit, "custom": {} if panel.number else curve}
    if panel.most is not None:
        defaults |= {"min": 0, "max": panel.most}
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    if panel.number:
        options = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value_and_name" if panel.title == "Runs" else "value",
            "colorMode": "value",
            "graphMode": "none",
        }
    return {
        "id": number,
        "type": "stat" if panel.number else "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "editorMode": "code",
                "expr": query.expression,
                "legendFormat": query.legend,
                "instant": panel.number,
                "range": not panel.number,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def as_json() -> str:
    """The dashboard as its file has it."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_json(), encoding="utf-8")
