"""The report of ``recovery.py``: one file a day, each of its two parts replaced when it is run."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

GOAL_SECONDS = 20.0
GOAL_DIFFERENCE = 1e-6
PARTS = {
    "notice": "until the controller says so",
    "clear": "until the old gang is gone and the new one has room",
    "start_workers": "until the new workers have met",
    "load": "until the engine has the checkpoint",
    "first_step": "until a step is done",
}


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write or update today's result."""
    stem = folder / f"recovery-{time.strftime('%Y-%m-%d')}"
    result: dict[str, Any] = {}
    if stem.with_suffix(".json").exists():
        result = json.loads(stem.with_suffix(".json").read_text())
    load = os.getloadavg()[0]
    result |= {name: {**part, "load": round(load, 1)} for name, part in found.items()}
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = "# Recovery: how soon a run goes on, and whether kills leave a trace\n\n"
    text += f"`python benchmarks/recovery.py` on {os.cpu_count()} cores ({platform.machine()}): "
    text += "a tiny decoder, fp32, a ring of two workers.\n"
    if "restarts" in result:
        text += _restarts(result["restarts"])
    if "kills" in result:
        text += _kills(result["kills"])
    stem.with_suffix(".md").write_text(text)
    print(text)


def _restarts(part: dict[str, Any]) -> str:
    measured = part["measured"]
    middle = median(each["seconds"] for each in measured)
    lost = max(each["lost_steps"] for each in measured)
    rows = [
        f"| {number} | {each['seconds']:.1f} s | "
        + " | ".join(f"{each[name]:.2f} s" for name in PARTS)
        + f" | {each['lost_steps']} |"
        for number, each in enumerate(measured, 1)
    ]
    heads = " | ".join(name.replace("_", " ") for name in PARTS)
    meant = "; ".join(f"{name.replace('_', ' ')}: {what}" for name, what in PARTS.items())
    return (
        f"\n## SIGKILL of a worker to the next step (1-minute load {part['load']})\n\n"
        f"Median {middle:.1f} s of {len(measured)}; the goal is < {GOAL_SECONDS:g} s: "
        f"{'met' if middle < GOAL_SECONDS else 'NOT met'}. At most {lost} steps were lost, with a "
        f"checkpoint every {part['every_steps']}: "
        f"{'met' if lost <= part['every_steps'] else 'NOT met'}.\n\n"
        f"| kill | in all | {heads} | steps lost |\n|{' --- |' * (3 + len(PARTS))}\n"
        + "\n".join(rows)
        + f"\n\n{meant}.\n"
    )


def _kills(part: dict[str, Any]) -> str:
    kills = part["kills"]
    targets = Counter(kill["target"] for kill in kills)
    moments = Counter(_moment(kill["phase"]) for kill in kills)
    same = part["none_left_out"] and part["same_rows"]
    worst = max(part["worst_loss_difference"], part["worst_validation_difference"])
    return (
        f"\n## {len(kills)} SIGKILLs in one run of {part['steps']} steps "
        f"(1-minute load {part['load']})\n\n"
        f"Killed: {_count(targets)}; in {_count(moments)}. {part['attempts']} gangs; a checkpoint "
        f"every {part['every_steps']} steps; {part['redone_steps']} steps were done again; "
        f"{part['seconds']:.0f} s against {part['undisturbed_seconds']:.0f} s undisturbed.\n\n"
        "| what | measured | goal | met |\n| --- | --- | --- | --- |\n"
        f"| every step is done, and has the undisturbed run's rows | {'yes' if same else 'NO'} "
        f"| yes | {'yes' if same else 'no'} |\n"
        f"| largest difference of any step's loss, redone ones too "
        f"| {part['worst_loss_difference']:.1e} | <= {GOAL_DIFFERENCE:g} "
        f"| {'yes' if part['worst_loss_difference'] <= GOAL_DIFFERENCE else 'no'} |\n"
        f"| of the held-out losses at the end | {part['worst_validation_difference']:.1e} "
        f"| <= {GOAL_DIFFERENCE:g} | {'yes' if worst <= GOAL_DIFFERENCE else 'no'} |\n"
        f"| the last step's loss | {part['final_loss']!r} | "
        f"{part['undisturbed_final_loss']!r} "
        f"| {'yes' if part['final_loss'] == part['undisturbed_final_loss'] else 'no'} |\n"
    )


def _moment(phase: str) -> str:
    return phase.partition(" of step")[0]


def _count(counter: Counter[str]) -> str:
    return ", ".join(f"{what} {number}" for what, number in counter.most_common())
