"""What makes a stage fit: it does, nothing of it is needless, and the YAML says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from ringworld_jobs.plan import model_config
from ringworld_jobs.planner.estimate import PlanError, choose_mesh, estimate_stage
from ringworld_jobs.planner.hardware import parse_gpus
from ringworld_jobs.planner.levers import find_remedy, shortage
from ringworld_jobs.spec import JobSpec

FULL = {"activation_checkpointing": "full"}
CASES: list[tuple[str, str, dict[str, Any], set[str]]] = [
    # Enough for the states; activations go first.
    ("llama2-7b", "8xH100", {}, {"activation_checkpointing"}),
    # A smaller micro-batch is cheaper than anything else.
    (
        "llama2-7b",
        "8xH100",
        {"micro_batch_size": 8, "zero_stage": 3, "memory": {"activation_checkpointing": "full"}},
        {"micro_batch_size"},
    ),
    ("llama2-7b", "8xA100-40GB", {"memory": FULL}, {"activation_offload", "zero_stage"}),
    (
        "llama2-7b",
        "8xH100",
        {"context_length": 2**20, "zero_stage": 3},
        {"activation_checkpointing", "mlp_tile_tokens"},
    ),
    ("65b", "8xH100", {"zero_stage": 3, "memory": FULL}, {"optimizer_offload"}),
    ("65b", "1xH100", {"zero_stage": 3, "memory": FULL}, {"max", "optimizer_offload"}),
    (
        "llama2-7b",
        "16xL40S",
        {"zero_stage": 3, "memory": FULL, "mesh": {"sequence_parallel": 1}, "loss": {}},
        set(),
    ),
]


def names(value: Any) -> set[str]:
    """The keys that hold no mapping."""
    found: set[str] = set()
    for key, inner in value.items():
        found |= names(inner) if isinstance(inner, dict) else {key}
    return found


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def with_yaml(spec: JobSpec, lines: tuple[str, ...]) -> JobSpec:
    """The job after somebody has written what the remedy says."""
    data = spec.model_dump(mode="json", exclude_none=True)
    for line in lines:
        change = yaml.safe_load(line)
        for stage in change.pop("stages", []):
            assert stage.pop("name") == data["stages"][0]["name"]
            data["stages"][0] = merged(data["stages"][0], stage)
        data = merged(data, change)
    return JobSpec.model_validate(data)


@pytest.mark.parametrize(("preset", "gpus", "stage", "expected"), CASES)
def test_the_cheapest_levers_make_it_fit(
    make_job: Callable[..., JobSpec],
    preset: str,
    gpus: str,
    stage: dict[str, Any],
    expected: set[str],
) -> None:
    hardware = parse_gpus(gpus)
    spec = make_job(preset, workers=hardware.count, **stage)
    model = model_config(spec)
    before = estimate_stage(spec, 0, hardware, model)
    if not expected:
        assert before.fits
        assert shortage(before) == ""
        return
    assert not before.fits
    assert "GiB" in shortage(before)
    remedy = find_remedy(spec, 0, hardware, model)
    assert remedy is not None
    changed = with_yaml(spec, remedy.yaml)
    again = estimate_stage(changed, 0, hardware.grown(remedy.count), model)
    assert again.fits
    assert again.memory == remedy.after.memory
    written = set[str]()
    for line in remedy.yaml:
        found = yaml.safe_load(line)
        for each in found.pop("stages", []):
            each.pop("name")
            written |= names(each)
        written |= names(found)
    assert written == expected


def test_each_change_of_a_remedy_is_needed(make_job: Callable[..., JobSpec]) -> None:
    hardware = parse_gpus("8xA100-40GB")
    spec = make_job(context_length=2**22, global_batch_tokens=2**22, zero_stage=3)
    model = model_config(spec)
    remedy = find_remedy(spec, 0, hardware, model)
    assert remedy is not None
    assert len(remedy.changes) > 2
    for left_out in remedy.changes:
        data = spec.model_dump(mode="json", exclude_none=True)
        for change in remedy.changes:
            if change is left_out:
                continue
            place = data if change.whole else data["stages"][0]
            for key in change.path[:-1]:
                place = place.setdefault(key, {})
            place[change.path[-1]] = change.value
        memory = data["stages"][0]["memory"]
        if memory["activation_offload"] and memory["activation_checkpointing"] == "none":
            continue  # refused
        count = hardware.count if left_out.count else remedy.count
        less = JobSpec.model_validate(data)
        assert not estimate_stage(less, 0, hardware.grown(count), model).fits


def test_too_little_host_memory_is_found_and_mended(make_job: Callable[..., JobSpec]) -> None:
    hardware = parse_gpus("8xH200")
    levers = {"activation_checkpointing": "attention_saved", "activation_offload": True}
    tile = {"mlp_tile_tokens": 4096}
    spec = make_job(
        context_length=2**21, global_batch_tokens=2**21, zero_stage=3, memory=levers | tile
    )
    model = model_config(spec)
    before = estimate_stage(spec, 0, hardware, model)
    assert before.fits_device
    assert not before.fits_host
    assert "offloaded activations" in shortage(before)
    remedy = find_remedy(spec, 0, hardware, model)
    assert remedy is not None
    assert remedy.yaml == ("stages: [{name: only, memory: {activation_checkpointing: full}}]",)


def test_too_few_workers_are_said(make_job: Callable[..., JobSpec]) -> None:
    spec = make_job(workers=64, fewest=8, context_length=2**17)
    with pytest.raises(PlanError, match=r"stages\[0\] \(only\).*wants 32 .*min = 8.*are 4"):
        choose_mesh(spec, 0, 4, model_config(spec))
