"""Time formulas: by hand, against the step records' own count, and when the rotation hides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ringworld_jobs.mesh import MeshSize
from ringworld_jobs.plan import model_config
from ringworld_jobs.planner.hardware import GPUS, Device
from ringworld_jobs.planner.saving import saving
from ringworld_jobs.planner.step_time import (
    MESSAGE_SECONDS,
    TRANSFER_EFFICIENCY,
    step_time,
)
from ringworld_jobs.planner.workload import Workload, workload
from ringworld_jobs.spec import JobSpec
from ringworld_workers.metrics import training_flops

H100 = GPUS["H100-80GB"]


def test_model_flops_are_those_of_the_step_records(make_work: Callable[..., Workload]) -> None:
    work = make_work(ring=4, rings=2)
    rows = [[32768]] * work.stage.rows_per_step
    counted = training_flops(work.model, rows, [work.step_tokens, 0])
    assert work.model_flops == pytest.approx(counted, rel=1e-9)


def test_a_source_of_short_documents_lets_attention_see_less(
    make_job: Callable[..., JobSpec],
) -> None:
    spec = make_job(context_length=32768)
    data = spec.model_dump(mode="json", exclude_none=True)
    data["data"]["sources"]["books"]["documents"] = {"max_tokens": 1024}
    short = JobSpec.model_validate(data)
    work = workload(short, 0, model_config(short), MeshSize(1, 1))
    assert work.row_pairs == 32 * 1024 * 1025 / 2


def exact(link: float) -> Device:
    """An H100 as the table of thresholds takes it, links at their full rate."""
    return replace(
        H100,
        forward_efficiency=0.65,
        backward_efficiency=0.55,
        link_bandwidth=link / TRANSFER_EFFICIENCY,
        network_bandwidth=link / TRANSFER_EFFICIENCY,
    )


@pytest.mark.parametrize(
    ("preset", "link", "forward", "backward"),
    [
        ("llama2-7b", 450e9, 2858, 2902),  # 32 heads, 32 key heads, over NVLink
        ("llama3-8b", 450e9, 715, 726),  # 8 key heads
        ("llama2-7b", 50e9, 25714, 26110),  # over a network of 400 Gb/s
        ("llama3-8b", 50e9, 6429, 6528),
    ],
)
def test_a_hop_hides_from_so_many_tokens_a_worker_on(
    make_work: Callable[..., Workload], preset: str, link: float, forward: int, backward: int
) -> None:
    """n >= 2 (K/H) e P / W forward, 2.4 (K/H) e P / W backward with gradients in fp32."""
    for tokens, which in ((forward, "forward_hop"), (backward, "backward_hop")):
        work = make_work(ring=8, preset=preset, context_length=8 * tokens, micro_batch_size=1)
        hop = getattr(step_time(work, exact(link)), which)
        ratio = (hop.transfer_seconds - MESSAGE_SECONDS) / hop.compute_seconds
        assert ratio == pytest.approx(1, rel=0.5 / tokens + 1e-3)  # whole tokens


def test_a_ring_inside_a_node_hides_and_one_across_the_network_waits(
    make_work: Callable[..., Workload],
) -> None:
    inside = step_time(make_work(ring=8, context_length=2**16), H100).ring
    assert inside.link == "node"
    assert inside.exposed_seconds == 0 < inside.hidden_seconds
    across = step_time(make_work(ring=16, context_length=2**16), H100).ring
    assert across.link == "network"
    assert across.exposed_seconds > 0


def test_a_7b_step_by_hand(make_work: Callable[..., Workload]) -> None:
    """One H100, one row of 32Ki, full checkpointing: forward twice, backward once."""
    levers = {"activation_checkpointing": "full"}
    work = make_work(memory=levers, global_batch_tokens=2**15)
    time = step_time(work, H100)
    pairs = 32768 * 32769 / 2
    attention = 4 * 32 * 4096 * pairs
    assert time.attention == pytest.approx(
        2 * attention / (989e12 * 0.38) + 2.5 * attention / (989e12 * 0.30)
    )
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    products = 8 * matrices * 32768 / (989e12 * 0.68)
    between = 4 * 32 * 32768 * 2 * (12 * 4096 + 6 * 4096 + 5 * 11008) / 3.35e12
    assert time.layers == pytest.approx(products + between)
    assert time.heads == pytest.approx(6 * 4096 * 32000 * 32768 / (989e12 * 0.68))
    assert time.optimizer == pytest.approx(32 * 6_738_415_616 / 3.35e12)
    assert time.exposed == 0
    assert time.total == pytest.approx(time.compute + time.optimizer)


@pytest.mark.parametrize(
    ("zero_stage", "turns", "bytes_per_parameter"),
    [
        (1, 1, 4 + 2),
        (1, 2, 4 + 2),
        (2, 2, 2 * 4 + 2),
        (3, 1, 2 + 2 + 4),
        (3, 2, 2 * (2 + 2 + 4)),
    ],
)
def test_what_zero_sends(
    make_work: Callable[..., Workload], zero_stage: int, turns: int, bytes_per_parameter: int
) -> None:
    work = make_work(rings=8, zero_stage=zero_stage, global_batch_tokens=turns * 8 * 2**15)
    sent = step_time(work, H100).zero
    assert sent.bytes_sent == pytest.approx(7 / 8 * bytes_per_parameter * 6_738_415_616)
    assert (sent.exposed_seconds == 0) == (zero_stage == 3)


def test_heads_that_are_split_send_in_the_open(make_work: Callable[..., Workload]) -> None:
    work = make_work(ring=2, heads=4)
    sent = step_time(work, H100).split_heads
    # q, k, v and the result of 4Ki tokens, in 2 bytes, three quarters of it for others; forward,
    # and twice as much backward.
    once = 4096 * (4 * 4096) * 2 * 3 / 4
    turns = work.accumulation
    assert sent.bytes_sent == turns * 32 * 3 * once
    assert sent.hidden_seconds == 0 < sent.exposed_seconds


def test_a_checkpoint_by_hand(make_job: Callable[..., JobSpec]) -> None:
    spec = make_job(steps=1000)
    work = workload(spec, 0, model_config(spec), MeshSize(1, 8))
    found = saving(spec, work, H100, step_seconds=9.0)
    assert found.num_bytes == 12 * 6_738_415_616
    assert found.stall_seconds == found.num_bytes / 8 / 50e9
    assert found.save_seconds == found.load_seconds == found.num_bytes / 1.4e9
    assert found.stall_per_step_seconds == found.stall_seconds / 100  # every 15 minutes
