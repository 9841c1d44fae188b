"""Memory formulas: by hand, against the model itself, and against measured peaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.plan import model_config
from ringworld_jobs.planner import memory
from ringworld_jobs.planner.estimate import estimate_stage
from ringworld_jobs.planner.hardware import GPUS, parse_gpus
from ringworld_jobs.planner.workload import Workload
from ringworld_jobs.spec import JobSpec, StageSpec
from ringworld_model.config import PRESETS, preset
from ringworld_model.transformer import WorldModel

P = 6_738_415_616  # Llama-2-7B's parameters, as published
BENCHMARK = Path(__file__).parents[3] / "benchmarks/results/memory-tiny-cpu-2026-11-22.json"
LEVERS: dict[str, dict[str, Any]] = {
    "tiled loss": {},
    "+ checkpointing: attention_saved": {"activation_checkpointing": "attention_saved"},
    "+ checkpointing: full": {"activation_checkpointing": "full"},
}
LEVERS["+ tiled MLP"] = LEVERS["+ checkpointing: full"] | {"mlp_tile_tokens": 256}
LEVERS["+ activation offload"] = LEVERS["+ tiled MLP"] | {"activation_offload": True}
LEVERS["+ optimizer offload"] = LEVERS["+ activation offload"] | {"optimizer_offload": True}
LEVERS["the same, attention_saved instead of full"] = LEVERS["+ optimizer offload"] | {
    "activation_checkpointing": "attention_saved"
}


@pytest.mark.parametrize(
    ("zero_stage", "weights", "gradients", "optimizer"),
    [
        (1, 2 * P, 4 * P, 12 * P / 8),
        (2, 2 * P, 4 * P / 8, 12 * P / 8),
        (3, 2 * P / 8, 4 * P / 8, 12 * P / 8),
    ],
)
def test_states_of_a_7b_model_over_eight_workers(
    make_work: Callable[..., Workload],
    zero_stage: int,
    weights: float,
    gradients: float,
    optimizer: float,
) -> None:
    found = memory.states(make_work(rings=8, zero_stage=zero_stage))
    assert (found["weights"], found["gradients"], found["optimizer"]) == (
        weights,
        gradients,
        optimizer,
    )
    # 200 million elements in fp32; stage 3 fills one bucket while it sends the other.
    assert found["buckets"] == 0.8e9 * (2 if zero_stage == 3 else 1)
    assert found["gathered"] == (2e9 if zero_stage == 3 else 0)


def test_states_without_zero_and_with_the_optimizer_on_the_host(
    make_work: Callable[..., Workload],
) -> None:
    plain = memory.states(make_work(rings=8, zero_stage=0, precision="fp32"))
    assert plain == {
        "weights": 4 * P,
        "gradients": 4 * P,
        "optimizer": 8 * P,
        "gathered": 0,
        "buckets": 0,
    }
    away = memory.states(make_work(rings=8, zero_stage=3, memory={"optimizer_offload": True}))
    assert away["optimizer"] == away["gradients"] == 0
    assert memory.checkpoint_bytes(make_work(rings=8)) == 12 * P


@pytest.mark.parametrize(
    ("levers", "bytes_per_token"),
    [
        ({}, 2 * (6 * 4096 + 4 * 4096 + 4 * 11008) + 4 * 32),
        ({"activation_checkpointing": "attention_saved"}, 2 * 5 * 4096 + 4 * 32),
        ({"activation_checkpointing": "full"}, 2 * 4096),
    ],
)
def test_what_a_layer_keeps(
    make_work: Callable[..., Workload], levers: dict[str, Any], bytes_per_token: int
) -> None:
    work = make_work(ring=4, memory=levers)
    assert memory.kept_per_token(work) == bytes_per_token
    assert memory.kept_bytes(work) == 32 * 8192 * bytes_per_token


def test_offloaded_activations_leave_three_layers_here_and_the_rest_there(
    make_work: Callable[..., Workload],
) -> None:
    levers = {"activation_checkpointing": "full", "activation_offload": True}
    work = make_work(memory=levers)
    assert memory.kept_bytes(work) == 3 * 32768 * 8192
    assert memory.offloaded_bytes(work) == 31 * 32768 * 8192


def test_ring_buffers_are_bounded_by_the_chunk(make_work: Callable[..., Workload]) -> None:
    assert memory.ring_bytes(make_work(ring=1)) == 0
    # 32Ki / 4 tokens x 128 x 4 bytes = 4 MiB a key head; 16 of 32 in a chunk of 64 MiB.
    assert memory.ring_bytes(make_work(ring=4)) == 4 * 2 * 64 * 2**20
    # One key head of 1Mi / 4 tokens is 128 MiB, more than a chunk: it goes alone.
    long = make_work(ring=4, context_length=2**20)
    assert memory.ring_bytes(long) == 4 * 2 * 128 * 2**20


@pytest.mark.parametrize("name", ["tiny", "debug", "200m", "llama3.2-1b"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    import torch

    shape = PRESETS[name]
    with torch.device("meta"):
        model = WorldModel(shape, rope_theta=1e4)
    matrices = sum(p.numel() for p in model.layers[0].parameters() if p.ndim == 2)
    stage = StageSpec.model_validate(
        {
            "name": "a",
            "context_length": "1Ki",
            "rope_theta": 1e4,
            "steps": 1,
            "global_batch_tokens": 1024,
            "mixture": {"a": 1},
            "learning_rate": {"peak": 1e-3},
        }
    )
    work = Workload(
        stage=stage, model=shape, mesh=MeshSize(1, 1), has_moments=True, document_tokens=1024
    )
    assert work.layer_parameters == matrices
    assert work.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", LEVERS)
@pytest.mark.parametrize("tokens", [1024, 2048])
def test_peaks_that_were_measured(name: str, tokens: int) -> None:
    """The live tensors of a whole step, within 15 %.

    There each gradient is made as the activations of its layer go, so that the peak holds none:
    an engine that keeps its gradients from step to step has them on top.
    """
    measured = json.loads(BENCHMARK.read_text())
    row = next(r for r in measured["rows"] if (r["levers"], r["tokens"]) == (name, tokens))
    stage = StageSpec.model_validate(
        {
            "name": "measured",
            "context_length": tokens,
            "rope_theta": 1e6,
            "steps": 1,
            "global_batch_tokens": tokens,
            "mixture": {"a": 1},
            "learning_rate": {"peak": 1e-5},
            "zero_stage": 0,
            "loss": {"tile_tokens": measured["options"]["loss_tile"]},
            "memory": LEVERS[name],
        }
    )
    shape = preset("tiny", num_layers=8, vision_codebook_size=0)
    work = Workload(
        stage=stage, model=shape, mesh=MeshSize(1, 1), has_moments=True, document_tokens=tokens
    )
    assert work.num_parameters == measured["parameters"]
    states = memory.states(work)
    held = states["weights"] + states["optimizer"]
    working = max(memory.layer_bytes(work), memory.loss_bytes(work))
    estimated = held + memory.kept_bytes(work, copies_wait=False) + working
    assert estimated == pytest.approx(row["peak"], rel=0.15)
    if "host_activations" in row:
        # The log-sum-exps of a head are rounded up to a piece of the pool.
        assert memory.offloaded_bytes(work) == pytest.approx(row["host_activations"], rel=0.001)


levers = st.fixed_dictionaries(
    {
        "activation_checkpointing": st.sampled_from(["none", "attention_saved", "full"]),
        "mlp_tile_tokens": st.sampled_from([None, 4096]),
    }
)
shapes = st.sampled_from(["200m", "1b", "llama2-7b", "llama3-8b", "13b"])


@settings(max_examples=60, deadline=None)
@given(
    name=shapes,
    zero_stage=st.sampled_from([1, 2, 3]),
    chosen=levers,
    context=st.sampled_from([2**15, 2**17, 2**20]),
    device=st.sampled_from(sorted(GPUS)),
)
def test_more_gpus_never_take_more_memory(
    make_job: Callable[..., JobSpec],
    name: str,
    zero_stage: int,
    chosen: dict[str, Any],
    context: int,
    device: str,
) -> None:
    peaks = []
    for count in (1, 2, 4, 8, 16, 32, 64):
        spec = make_job(
            name,
            workers=count,
            zero_stage=zero_stage,
            memory=chosen,
            context_length=context,
            global_batch_tokens=2**22,
        )
        found = estimate_stage(spec, 0, parse_gpus(f"{count}x{device}"), model_config(spec))
        peaks.append(found.memory.device_bytes)
    assert peaks == sorted(peaks, reverse=True)


@settings(max_examples=60, deadline=None)
@given(
    name=shapes,
    zero_stage=st.sampled_from([1, 2, 3]),
    chosen=levers,
    ring=st.sampled_from([1, 2, 8]),
    heads=st.sampled_from([1, 2]),
)
def test_a_longer_context_never_takes_less(
    make_job: Callable[..., JobSpec],
    name: str,
    zero_stage: int,
    chosen: dict[str, Any],
    ring: int,
    heads: int,
) -> None:
    found = []
    for context in (2**13, 2**15, 2**17, 2**20):
        spec = make_job(
            name,
            workers=16,
            zero_stage=zero_stage,
            memory=chosen,
            context_length=context,
            global_batch_tokens=context,
        )
        mesh = MeshSize(ring, 1, heads)
        stage = estimate_stage(spec, 0, parse_gpus("16xH100"), model_config(spec), mesh)
        found.append((stage.memory.device_bytes, stage.memory.host_bytes, stage.time.total))
    for earlier, later in zip(found, found[1:], strict=False):
        assert all(b >= a for a, b in zip(earlier, later, strict=True))
