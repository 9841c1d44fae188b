"""The real model on a mesh, under ZeRO: one step and its checkpoint, against one process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ringworld_jobs.spec import MemorySpec, OptimizerSpec, StageSpec
from ringworld_model.batch import TrainBatch, cut
from ringworld_model.config import preset
from ringworld_model.loss import combine
from ringworld_model.packing import Example, pack_row
from ringworld_model.ring import RingContext, plan_ring
from ringworld_model.tokens import text_example
from ringworld_model.transformer import WorldModel, init_weights
from ringworld_workers.engine.build import build_engine
from ringworld_workers.mesh import build_mesh

CONTEXT_LENGTH = 384
NUM_ROWS = 4
RATE = 0.5

NONE = MemorySpec()
SAVED = MemorySpec(activation_checkpointing="attention_saved")
FULL = MemorySpec(activation_checkpointing="full")
TILED = MemorySpec(mlp_tile_tokens=80)  # 192 tokens a rank: the last tile is shorter
ALL_SAVED = MemorySpec(
    activation_checkpointing="attention_saved",
    activation_offload=True,
    mlp_tile_tokens=80,
    optimizer_offload=True,
    parameter_offload=True,
)
ALL_FULL = ALL_SAVED.model_copy(update={"activation_checkpointing": "full"})


def make_model(memory: MemorySpec = NONE) -> WorldModel:
    config = preset("tiny", num_kv_heads=1, tie_text_embeddings=True)
    model = WorldModel(
        config,
        rope_theta=1e4,
        activation_checkpointing=memory.activation_checkpointing,
        activation_offload=memory.activation_offload,
        mlp_tile_tokens=memory.mlp_tile_tokens,
    )
    init_weights(model, 0)
    return model


def rows() -> list[TrainBatch]:
    """Packed rows of odd lengths; the last has no vision at all."""
    generator = np.random.default_rng(0)
    found = []
    for row in range(NUM_ROWS):
        examples = []
        for length in (130 + 10 * row, 37, 150):
            vision = generator.random(length) < (0.0 if row == NUM_ROWS - 1 else 0.4)
            target_vision = np.append(vision[1:], False)
            examples.append(
                Example(
                    tokens=generator.integers(0, 500, length).astype(np.int32),
                    modality=vision.astype(np.uint8),
                    targets=generator.integers(0, 500, length).astype(np.int32),
                    target_modality=target_vision.astype(np.uint8),
                    loss_mask=np.ones(length, np.uint8),
                )
            )
        found.append(pack_row(examples, CONTEXT_LENGTH, "example"))
    return found


def global_weight() -> torch.Tensor:
    weight = torch.zeros(2, dtype=torch.float64)
    for row in rows():
        weight.index_add_(0, row.target_modality.view(-1).int(), row.loss_weights.view(-1).double())
    return weight


def ring_of(row: TrainBatch, ring_size: int, group: Any) -> RingContext:
    plan = plan_ring(
        document_lengths=row.document_lengths[0],
        context_length=CONTEXT_LENGTH,
        ring_size=ring_size,
        layout="auto",
    )
    return RingContext(plans=[plan], group=group)


def stage_of(zero_stage: int, memory: MemorySpec, num_rows: int = NUM_ROWS) -> StageSpec:
    return StageSpec.model_validate(
        {
            "name": "a",
            "context_length": f"{CONTEXT_LENGTH}",
            "rope_theta": 1e4,
            "steps": 3,
            "global_batch_tokens": CONTEXT_LENGTH * num_rows,
            "mixture": {"a": 1},
            "learning_rate": {"peak": RATE},
            "zero_stage": zero_stage,
            "memory": memory,
        }
    )


def one_step(
    rank: int, world_size: int, name: str, zero_stage: int, memory: MemorySpec
) -> tuple[float, list[tuple[Any, ...]]]:
    gc.freeze()
    mesh = build_mesh(2, world_size // 2)
    stage = stage_of(zero_stage, memory)
    spec = OptimizerSpec(name="sgd", clip_norm=0.5)
    engine = build_engine(name, make_model(memory), spec, stage, mesh)
    weight = global_weight()
    per_ring = NUM_ROWS // mesh.data_parallel_size
    first = mesh.data_parallel_rank * per_ring
    for row in rows()[first : first + per_ring]:
        ring = ring_of(row, 2, mesh.sequence_parallel_group)
        sums = engine(cut(row, ring.plans, mesh.sequence_parallel_rank), ring)
        engine.backward(combine(sums, weight, (0.5, 0.5), engine.loss_factor))
    norm = engine.step()
    ranges = [(r.tensor, r.start, r.data.clone()) for r in engine.owned_ranges()]
    engine.close()
    return norm, ranges


@pytest.fixture(scope="module")
def truth() -> tuple[float, dict[str, torch.Tensor]]:
    model = make_model()
    for row in rows():
        combine(model(row, ring_of(row, 1, None)), global_weight(), (0.5, 0.5)).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            decay = 0.1 if parameter.ndim >= 2 else 0.0
            parameter -= RATE * (parameter.grad + decay * parameter)
    return norm, {name: p.detach().reshape(-1) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "zero_stage", "world_size", "memory"),
    [
        ("torch", 0, 2, NONE),
        ("deepspeed", 0, 2, SAVED),
        ("deepspeed", 1, 4, NONE),
        ("deepspeed", 2, 2, FULL),
        ("deepspeed", 3, 4, SAVED),
        ("deepspeed", 3, 2, FULL),
        ("deepspeed", 3, 2, TILED),
        ("deepspeed", 3, 2, ALL_SAVED),
        ("deepspeed", 3, 4, ALL_FULL),
    ],
)
def test_a_ring_under_zero_takes_the_step_of_one_process(
    run_gang: Callable[..., list[Any]],
    truth: tuple[float, dict[str, torch.Tensor]],
    name: str,
    zero_stage: int,
    world_size: int,
    memory: MemorySpec,
) -> None:
    results = run_gang(one_step, world_size, name, zero_stage, memory)
    wanted_norm, weights = truth
    seen = dict.fromkeys(weights, 0)
    for norm, ranges in results:
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
        for tensor, start, data in ranges:
            wanted = weights[tensor][start : start + data.numel()]
            assert float((data - wanted).abs().max()) <= 1e-6, tensor
            seen[tensor] += data.numel()
    assert seen == {tensor: weight.numel() for tensor, weight in weights.items()}


def left_behind(
    rank: int, world_size: int, num_steps: int, memory: MemorySpec
) -> tuple[int, list[str]]:
    from deepspeed.runtime.zero import parameter_offload

    def external_parameters(module: Any) -> Any:
        return getattr(module, "_external_params", None)

    mesh = build_mesh(1, world_size)
    stage = stage_of(3, memory, num_rows=1)
    engine = build_engine("deepspeed", make_model(memory), OptimizerSpec(name="sgd"), stage, mesh)
    ring = ring_of(rows()[0], 1, None)
    for _ in range(num_steps):
        sums = engine(rows()[0], ring)
        engine.backward(combine(sums, global_weight(), (0.5, 0.5), engine.loss_factor))
        engine.step()
    borrowers = [
        name for name, module in engine.module.named_modules() if external_parameters(module)
    ]
    engine.close()
    return len(parameter_offload.FWD_MODULE_STACK), borrowers


@pytest.mark.parametrize("memory", [FULL, ALL_FULL])
def test_recomputation_leaves_no_modules_behind(
    run_gang: Callable[..., list[Any]], memory: MemorySpec
) -> None:
    """Nor does a module use another's parameters, which ZeRO-3 would then guess the owner of."""
    assert run_gang(left_behind, 1, 3, memory) == [(1, [])]


def short_row() -> TrainBatch:
    generator = np.random.default_rng(7)
    ids = generator.integers(0, 500, 49).astype(np.int32)
    return pack_row([text_example(ids)], 50, "example")


def uneven_step(rank: int, world_size: int, memory: MemorySpec) -> list[tuple[Any, ...]]:
    """Rank 0 has five tiles of tokens, rank 1 one."""
    mesh = build_mesh(1, world_size)
    stage = stage_of(3, memory)
    spec = OptimizerSpec(name="sgd", clip_norm=0)
    engine = build_engine("deepspeed", make_model(memory), spec, stage, mesh)
    for _ in range(NUM_ROWS // world_size):
        row = short_row() if rank else rows()[0]
        plan = plan_ring(
            document_lengths=row.document_lengths[0],
            context_length=row.tokens.shape[1],
            ring_size=1,
            layout="auto",
        )
        sums = engine(row, RingContext(plans=[plan], group=None))
        engine.backward(combine(sums, global_weight(), (0.5, 0.5), engine.loss_factor))
    engine.step()
    ranges = [(r.tensor, r.start, r.data.clone()) for r in engine.owned_ranges()]
    engine.close()
    return ranges


def test_ranks_may_have_different_numbers_of_tiles(run_gang: Callable[..., list[Any]]) -> None:
    whole, tiled = (run_gang(uneven_step, 2, memory) for memory in (NONE, ALL_FULL))
    for wanted, found in zip(whole, tiled, strict=True):
        for (name, start, values), (tensor, first, data) in zip(wanted, found, strict=True):
            assert (tensor, first) == (name, start)
            assert float((data - values).abs().max()) <= 1e-6, name
