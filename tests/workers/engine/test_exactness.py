"""Every engine, ZeRO stage, world size and accumulation takes the step that one process takes."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ringworld_jobs.spec import LearningRateSpec, MemorySpec, OptimizerSpec, StageSpec
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import build_mesh

ROWS = 12
NUM_STEPS = 3

Gang = Callable[..., list[Any]]

DEVICE = MemorySpec()
HOST = MemorySpec(optimizer_offload=True)
ALL_HOST = MemorySpec(optimizer_offload=True, parameter_offload=True)


class Net(nn.Module):
    """A table that is too large to stay whole at stage 3, odd sizes, and two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(401, 307) * 0.05)
        self.up = nn.Linear(307, 53)
        self.norm = nn.LayerNorm(53)
        self.down = nn.Linear(53, 7, bias=False)

    def forward(self, ids: torch.Tensor, *, wanted: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.up(self.table[ids])))
        return ((self.down(hidden).float() - wanted) ** 2).sum()


def make_net() -> Net:
    torch.manual_seed(1)
    return Net()


def rows_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randint(0, 401, (ROWS,), generator=generator),
        torch.randn(ROWS, 7, generator=generator),
    )


def rate_of(step: int) -> float:
    return 0.002 * (step + 1)


def stage_of(num_rows: int, zero_stage: int, precision: str, memory: MemorySpec) -> StageSpec:
    return StageSpec.model_validate(
        {
            "name": "a",
            "context_length": "128",
            "rope_theta": 1e4,
            "steps": NUM_STEPS,
            "global_batch_tokens": 128 * num_rows,
            "mixture": {"a": 1},
            "learning_rate": LearningRateSpec(peak=1.0),
            "zero_stage": zero_stage,
            "precision": precision,
            "memory": memory,
        }
    )


def train(
    rank: int,
    world_size: int,
    name: str,
    zero_stage: int,
    optimizer: str,
    accumulation: int,
    clip_norm: float,
    precision: str = "fp32",
    memory: MemorySpec = DEVICE,
) -> dict[str, Any]:
    gc.freeze()  # what the fork inherited need not be searched by DeepSpeed's collections
    mesh = build_mesh(1, world_size)
    engine = build_engine(
        name,
        make_net(),
        OptimizerSpec(name=optimizer, clip_norm=clip_norm),
        stage_of(world_size * accumulation, zero_stage, precision, memory),
        mesh,
    )
    per_call = ROWS // (world_size * accumulation)

    def micro_step(step: int, call: int, factor: float = 1.0) -> None:
        ids, wanted = rows_of(step)
        mine = slice(call * per_call, (call + 1) * per_call)
        loss = engine(ids[mine], wanted=wanted[mine]) / ROWS
        engine.backward(loss * engine.loss_factor * factor)

    norms, scores = [], []
    for step in range(NUM_STEPS):
        engine.set_learning_rate(rate_of(step))
        for call in range(accumulation):
            micro_step(step, rank * accumulation + call)
        norms.append(engine.step())
        with engine.evaluate():
            ids, wanted = rows_of(100)
            scores.append(float(engine(ids, wanted=wanted)))
    before = copy_of(engine)
    state = engine.optimizer_state()
    misuse = []
    try:
        engine.step()
    except RuntimeError as error:
        misuse.append(str(error))
    for call in range(accumulation):
        # Only rank 0's gradient is broken; all must notice.
        micro_step(7, rank * accumulation + call, math.inf if rank == 0 else 1.0)
    broken_norm = engine.step()
    after = copy_of(engine)
    with engine.evaluate():
        ids, wanted = rows_of(100)
        scores.append(float(engine(ids, wanted=wanted)))
    engine.close()
    return {
        "norms": norms,
        "scores": scores,
        "ranges": before,
        "unchanged": all(
            torch.equal(a[4], b[4]) for a, b in zip(before, after, strict=True) if a[1] == "param"
        ),
        "broken_norm": broken_norm,
        "state": state,
        "misuse": misuse,
    }


def copy_of(engine: Any) -> list[tuple[Any, ...]]:
    return [(r.tensor, r.kind, r.shape, r.start, r.data.clone()) for r in engine.owned_ranges()]


def assemble(results: list[dict[str, Any]]) -> dict[tuple[str, str], torch.Tensor]:
    """All ranks' ranges as whole tensors; fails if they overlap or leave a gap."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for result in results:
        for tensor, kind, shape, start, data in result["ranges"]:
            flat = whole.setdefault(
                (tensor, kind), torch.full((math.prod(shape),), math.nan, dtype=torch.float32)
            )
            assert data.dtype == torch.float32
            assert torch.isnan(flat[start : start + data.numel()]).all(), f"{tensor} overlaps"
            flat[start : start + data.numel()] = data
    assert not any(torch.isnan(flat).any() for flat in whole.values()), "a gap"
    return whole


def one_process(optimizer: str, clip_norm: float) -> dict[str, Any]:
    """What plain torch does with all rows at once: the truth."""
    net = make_net()
    decay = [p for p in net.parameters() if p.ndim >= 2]
    rest = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    updater: torch.optim.Optimizer
    if optimizer == "sgd":
        updater = torch.optim.SGD(groups, lr=1.0)
    else:
        updater = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    norms, scores = [], []
    for step in range(NUM_STEPS):
        ids, wanted = rows_of(step)
        (net(ids, wanted=wanted) / ROWS).backward()
        limit = clip_norm if clip_norm else math.inf
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), limit)))
        for group in updater.param_groups:
            group["lr"] = rate_of(step)
        updater.step()
        updater.zero_grad()
        with torch.no_grad():
            ids, wanted = rows_of(100)
            scores.append(float(net(ids, wanted=wanted)))
    weights = {name: p.detach().reshape(-1) for name, p in net.named_parameters()}
    return {"norms": norms, "scores": scores, "weights": weights}


def check(results: list[dict[str, Any]], truth: dict[str, Any], tolerance: float) -> None:
    whole = assemble(results)
    for name, weight in truth["weights"].items():
        assert float((whole[name, "param"] - weight).abs().max()) <= tolerance, name
    for result in results:
        assert result["norms"] == pytest.approx(truth["norms"], rel=2e-6)
        assert result["scores"][:NUM_STEPS] == pytest.approx(truth["scores"], rel=2e-6)
        assert result["unchanged"], "a step with a broken gradient changed weights"
        assert result["scores"][-1] == result["scores"][-2]
        assert not math.isfinite(result["broken_norm"])
        assert len(result["misuse"]) == 1 and "step after 0 backward calls" in result["misuse"][0]


# Each stage meets each world size, both accumulations, and clipping on and off.
CASES = [
    (0, 1, 3, 0.5),
    (0, 2, 1, 0.0),
    (0, 4, 3, 0.5),
    (1, 1, 1, 0.5),
    (1, 2, 3, 0.5),
    (1, 4, 1, 0.0),
    (2, 1, 3, 0.0),
    (2, 2, 1, 0.5),
    (2, 4, 3, 0.5),
    (3, 1, 1, 0.5),
    (3, 2, 3, 0.0),
    (3, 4, 3, 0.5),
]


@pytest.mark.parametrize(("zero_stage", "world_size", "accumulation", "clip_norm"), CASES)
def test_sgd_of_deepspeed_is_one_process(
    run_gang: Gang, zero_stage: int, world_size: int, accumulation: int, clip_norm: float
) -> None:
    results = run_gang(train, world_size, "deepspeed", zero_stage, "sgd", accumulation, clip_norm)
    check(results, one_process("sgd", clip_norm), 5e-7)


@pytest.mark.parametrize(
    ("zero_stage", "world_size", "accumulation", "memory"),
    [(1, 2, 3, HOST), (2, 2, 1, HOST), (2, 1, 3, HOST), (3, 2, 3, HOST), (3, 1, 1, ALL_HOST)],
)
def test_sgd_on_the_host_is_one_process(
    run_gang: Gang, zero_stage: int, world_size: int, accumulation: int, memory: MemorySpec
) -> None:
    settings = "deepspeed", zero_stage, "sgd", accumulation, 0.5, "fp32", memory
    check(run_gang(train, world_size, *settings), one_process("sgd", 0.5), 5e-7)


@pytest.mark.parametrize(("world_size", "accumulation", "clip_norm"), [(1, 1, 0.0), (3, 2, 0.5)])
def test_sgd_of_the_torch_engine_is_one_process(
    run_gang: Gang, world_size: int, accumulation: int, clip_norm: float
) -> None:
    results = run_gang(train, world_size, "torch", 0, "sgd", accumulation, clip_norm)
    check(results, one_process("sgd", clip_norm), 5e-7)


@pytest.mark.parametrize(
    ("name", "zero_stage", "memory"),
    [
        ("torch", 0, DEVICE),
        ("deepspeed", 1, DEVICE),
        ("deepspeed", 3, DEVICE),
        ("deepspeed", 1, HOST),
        ("deepspeed", 3, ALL_HOST),
    ],
)
def test_adamw_decays_matrices_only(
    run_gang: Gang, name: str, zero_stage: int, memory: MemorySpec
) -> None:
    results = run_gang(train, 2, name, zero_stage, "adamw", 1, 0.5, "fp32", memory)
    check(results, one_process("adamw", 0.5), 2e-6)
    state = results[0]["state"]
    assert (state.name, state.step) == ("adamw", NUM_STEPS)
    assert [(g.name, g.weight_decay) for g in state.groups] == [("decay", 0.1), ("no_decay", 0.0)]
    assert state.groups[0].learning_rate == pytest.approx(rate_of(NUM_STEPS - 1))


@pytest.fixture(scope="module")
def bf16_oracle(run_gang: Gang) -> list[dict[str, Any]]:
    return run_gang(train, 1, "torch", 0, "sgd", 1, 0.5, "bf16")


@pytest.mark.parametrize(
    ("zero_stage", "memory"),
    [(0, DEVICE), (2, DEVICE), (3, DEVICE), (1, HOST), (2, HOST), (3, ALL_HOST)],  # 0 runs as 1
)
def test_bf16_has_fp32_masters(
    run_gang: Gang, bf16_oracle: list[dict[str, Any]], zero_stage: int, memory: MemorySpec
) -> None:
    results = run_gang(train, 2, "deepspeed", zero_stage, "sgd", 3, 0.5, "bf16", memory)
    oracle = bf16_oracle
    truth, whole = assemble(oracle), assemble(results)
    start = dict(make_net().named_parameters())
    for (name, kind), weight in truth.items():
        moved = float((weight - start[name].detach().reshape(-1)).abs().max())
        apart = float((whole[name, kind] - weight).abs().max())
        assert apart <= 0.03 * moved + 1e-6, (name, apart, moved)
    assert results[0]["norms"] == pytest.approx(oracle[0]["norms"], rel=0.02)
